"""`powerinfer build`: the whole pipeline in one command."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from powerinfer_tools.cli import console, options

if TYPE_CHECKING:
    from powerinfer_tools.build import Stage


def build(
    model: options.Checkpoint,
    output: options.Output,
    corpus: Annotated[
        list[Path] | None,
        typer.Option("--corpus", metavar="FILE", help="Text to read; may be given more than once."),
    ] = None,
    counts: Annotated[
        Path | None,
        typer.Option(
            "--counts",
            metavar="FOLDER",
            rich_help_panel=options.BUILD,
            help="activation_N.pt of the first PowerInfer instead of a corpus; for its model files, the folder "
            "activation beside them is taken by itself.",
        ),
    ] = None,
    pretrained: Annotated[
        Path | None,
        typer.Option(
            "--pretrained",
            metavar="PATH",
            rich_help_panel=options.BUILD,
            help="Take over predictors of the first PowerInfer instead of training: a folder of model_N.pt, or a model "
            "file of it; a model's own (such a file's, TurboSparse-Mistral's) are taken by themselves.",
        ),
    ] = None,
    quant: Annotated[
        Literal["auto", "f32", "f16", "q8_0", "q4_0"],
        typer.Option(
            "--quant",
            rich_help_panel=options.BUILD,
            help="Type of the artifact's matrices; auto: q8_0 below 10^9 parameters, else q4_0; a model file of the "
            "first PowerInfer keeps its own.",
        ),
    ] = "auto",
    sparsity: options.Sparsity = None,
    tokens: options.Tokens = options.TOKENS,
    recall: options.Recall = options.RECALL,
    error: options.Error = options.ERROR,
    top1: options.Top1 = options.TOP1,
    perplexity: options.Perplexity = options.PERPLEXITY,
    ram: options.Ram = None,
    ctx_size: Annotated[
        int | None,
        typer.Option(
            "-c",
            "--ctx-size",
            min=1,
            rich_help_panel=options.RUN,
            help="Tokens of context to place memory for; without it, 4096 or the model's.",
        ),
    ] = None,
    machine: options.Machine = None,
    activation: options.Activation = None,
    patch: options.Patch = None,
    seed: options.BuildSeed = options.BUILD_SEED,
    keep: Annotated[
        bool,
        typer.Option(
            "--keep",
            rich_help_panel=options.OUTPUT,
            help="Leave the stages' files (.activations, .predictors, .placement) beside the output.",
        ),
    ] = False,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Profile, train, place and split in one go; a killed build goes on where it stopped.

    powerinfer build model/ --corpus text.txt -o model.gguf

    powerinfer build model.gguf --corpus a.txt --corpus b.txt --sparsity 0.25 --quant q8_0 -o sparse.gguf

    powerinfer build model.gguf --patch sparse.patch.safetensors --corpus text.txt -o sparse.gguf

    powerinfer build model/ --corpus text.txt --keep -o model.gguf && ls model.*

    powerinfer build relu-llama.powerinfer.gguf -o model.gguf     (a model file of the first PowerInfer)
    """
    from powerinfer_tools import build as library
    from powerinfer_tools.placement import read_machine

    stages: list[Stage] = []

    def report(stage: "Stage") -> None:
        stages.append(stage)
        took = "up to date" if stage.up_to_date else f"{stage.seconds:.1f} s"
        wrote = f"; wrote {stage.path}" if keep and not stage.up_to_date else ""
        console.say(f"{stage.name}: {took}: {stage.summary}{wrote}")

    started = time.monotonic()
    with console.progress() as progress:
        artifact = library.build(
            model,
            corpus or [],
            output,
            counts=counts,
            pretrained=pretrained,
            note=lambda text: console.say(f"note: {text}"),
            activation=activation,
            patch=patch,
            quant=quant,
            sparsity=sparsity,
            n_tokens=tokens,
            recall=recall,
            error=error,
            top1=top1,
            perplexity=perplexity,
            ram=ram,
            ctx_size=ctx_size,
            machine=read_machine(machine) if machine else None,
            seed=seed,
            keep=keep,
            force=force,
            progress=progress,
            report=report,
        )
    if not artifact.config.exactly_sparse:
        console.say(
            f"note: {artifact.config.activation} is never exactly zero: nothing is skipped; --sparsity S cuts it"
        )
    if quant == "auto":
        console.say(f"quant auto: {artifact.quant}")
    console.say(f"build: {time.monotonic() - started:.1f} s")
    if all(stage.up_to_date for stage in stages):
        console.say(f"{output} is up to date; next: powerinfer chat {output}")
    else:
        console.wrote(output, f"powerinfer chat {output}")
    if json:
        fields = ("name", "seconds", "up_to_date", "summary")
        document = {"path": str(output), "bytes": artifact.n_bytes, "quant": artifact.quant}
        console.print_json(document | {"stages": [{key: getattr(s, key) for key in fields} for s in stages]})
