"""`powerinfer split`: checkpoint, activations and predictors → the artifact."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from powerinfer_tools.cli import console, options

if TYPE_CHECKING:
    from powerinfer_tools.checkpoint import Checkpoint


def split(
    model: options.Checkpoint,
    activations: options.Activations,
    output: options.Output,
    predictors: options.Predictors = None,
    placement: options.Placement = None,
    quant: options.Quant = options.QUANT,
    format: Annotated[
        Literal["artifact", "powerinfer"],
        typer.Option(
            "--format",
            rich_help_panel=options.BUILD,
            help="powerinfer: what the first PowerInfer runs (llama, falcon and opt with ReLU, bamboo; F16 or Q4_0; "
            "predictors that were made for it), and its counts in the folder activation beside it.",
        ),
    ] = "artifact",
    activation: options.Activation = None,
    patch: options.Patch = None,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write the artifact that the engine runs: neurons sorted by firing frequency, bundled and quantised.

    powerinfer split model/ --activations m.activations --predictors m.predictors -o model-Q4_0.gguf

    powerinfer split model/ --activations m.activations --quant q8_0 -o model-Q8_0.gguf --json

    powerinfer split model/ --activations A --predictors P --format powerinfer --quant f16 -o m.powerinfer.gguf
    """
    from powerinfer_tools.activations import read_activations
    from powerinfer_tools.artifact import split as split_checkpoint
    from powerinfer_tools.artifact.layout import MODE_NAMES
    from powerinfer_tools.checkpoint import open_checkpoint
    from powerinfer_tools.errors import PowerinferError
    from powerinfer_tools.placement import read_placement
    from powerinfer_tools.predictors import read_predictors

    checkpoint = open_checkpoint(model, activation, patch)
    for note in checkpoint.notes:
        console.say(f"note: {note}")
    if format == "powerinfer":
        if placement is not None:
            raise PowerinferError("--placement: expected none with --format powerinfer, whose engine places", "usage")
        _for_first_powerinfer(checkpoint, activations, predictors, output, quant, force)
        if json:
            console.print_json({"path": str(output), "bytes": output.stat().st_size, "quant": quant})
        return
    with console.progress() as progress:
        artifact = split_checkpoint(
            checkpoint,
            read_activations(activations),
            output,
            predictors=read_predictors(predictors) if predictors else None,
            placement=read_placement(placement) if placement else None,
            quant=quant,
            force=force,
            progress=progress,
        )
    modes = [MODE_NAMES[mode] for mode in artifact.modes]
    if not artifact.config.exactly_sparse:
        console.say(
            f"note: {artifact.config.activation} is never exactly zero: all layers run in mode gate and skip nothing; "
            "profile with --sparsity to cut it"
        )
    else:
        console.say(f"{modes.count('predictor')} layers with a predictor, {modes.count('gate')} in mode gate")
    console.wrote(output, f'powerinfer generate {output} -p "Once upon a time"')
    if json:
        inputs = artifact.provenance["inputs"]
        document = {"path": str(output), "bytes": artifact.n_bytes, "quant": quant, "modes": modes, "inputs": inputs}
        console.print_json(document | {"data_sha256": artifact.data_sha256})


def _for_first_powerinfer(
    checkpoint: "Checkpoint", activations: Path, predictors: Path | None, output: Path, quant: str, force: bool
) -> None:
    from powerinfer_tools.activations import read_activations
    from powerinfer_tools.artifact.pwri_writer import write_pwri
    from powerinfer_tools.errors import PowerinferError
    from powerinfer_tools.predictors import read_predictors

    if predictors is None:
        raise PowerinferError("--format powerinfer: expected --predictors FILE, found none", "usage")
    profile, trained = read_activations(activations), read_predictors(predictors)
    with console.progress() as progress:
        write_pwri(checkpoint, profile, trained, output, quant=quant, force=force, progress=progress)
    console.wrote(output, f'./main -m {output} -p "Once upon a time"')
