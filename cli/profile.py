"""`powerinfer profile`: checkpoint and text → activations."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from powerinfer_tools.cli import console, options

if TYPE_CHECKING:
    from powerinfer_tools.activations import Activations


def profile(
    model: options.Checkpoint,
    corpus: options.Corpus,
    output: options.Output,
    tokens: options.Tokens = options.TOKENS,
    samples: options.Samples = options.SAMPLES,
    window: Annotated[
        int, typer.Option("--window", min=2, rich_help_panel=options.BUILD, help="Tokens of one text passage.")
    ] = 512,
    sparsity: options.Sparsity = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE.png",
            rich_help_panel=options.OUTPUT,
            help="Draw the share of activations against the share of neurons.",
        ),
    ] = None,
    activation: options.Activation = None,
    patch: options.Patch = None,
    seed: options.BuildSeed = options.BUILD_SEED,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Count which neurons of a model fire on a corpus, and how often; a killed run goes on where it stopped.

    powerinfer profile model/ --corpus text.txt -o model.activations

    powerinfer profile model.gguf --corpus a.txt --corpus b.txt --sparsity 0.25 -o model.activations

    powerinfer profile model/ --corpus text.txt --plot curves.png -o model.activations --json | jq .active_share
    """
    from powerinfer_tools import activations as library
    from powerinfer_tools.checkpoint import open_checkpoint
    from powerinfer_tools.files import check_writable

    if plot is not None:
        library.check_plot()
        check_writable(plot, force)
    checkpoint = open_checkpoint(model, activation, patch)
    with console.progress() as progress:
        activations = library.profile(
            checkpoint,
            corpus,
            output,
            n_tokens=tokens,
            n_samples=samples,
            sparsity=sparsity,
            window=window,
            seed=seed,
            force=force,
            progress=progress,
        )
    report = library.report(activations)
    for note in (*checkpoint.notes, *_notes(checkpoint.config.activation, activations, tokens, model)):
        console.say(f"note: {note}")
    if plot is not None:
        library.plot(activations, plot, force)
        console.wrote(plot)
    following = f"powerinfer train {options.named(model, patch)} --activations {output}"
    console.wrote(output, f"{following} -o {output.with_suffix('.predictors')}")
    if json:
        console.print_json(report)
    else:
        show(report)


def _notes(activation: str, activations: "Activations", tokens: int, model: Path) -> list[str]:
    notes = []
    if activations.n_tokens < tokens // activations.window * activations.window:
        notes.append(
            f"the corpus has {activations.n_tokens} tokens in whole windows, fewer than the {tokens} asked for"
        )
    if activation == "silu" and not any(activations.thresholds):
        notes.append(
            "silu is never exactly zero, so every neuron fires; for a sparse model, cut it (costs quality): "
            f"powerinfer profile {model} --sparsity 0.25 …"
        )
    return notes


def show(report: dict[str, Any]) -> None:
    """A line a layer, and one for the whole model."""
    rows = [
        (
            layer["layer"],
            f"{layer['active_share']:.1%}",
            f"{layer['neurons_making_80']:.1%}",
            f"{layer['threshold']:.4g}",
        )
        for layer in report["layers"]
    ]
    rows.append(("all", f"{report['active_share']:.1%}", f"{report['neurons_making_80']:.1%}", ""))
    title = f"{report['tokens']} tokens"
    console.table(title, ("layer", "active share", "neurons making 80 % of activations", "threshold"), rows)
