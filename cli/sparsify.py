"""`powerinfer sparsify`: a dense gated checkpoint → an exactly sparse one."""

import os
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from powerinfer_tools.cli import console, options

if TYPE_CHECKING:
    from powerinfer_tools.sparsify import Result, Step


def sparsify(
    model: options.Checkpoint,
    corpus: options.Corpus,
    output: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="FOLDER", rich_help_panel=options.OUTPUT, help="The folder to write."),
    ],
    active: Annotated[
        float,
        typer.Option("--active", metavar="X", rich_help_panel=options.BUILD, help="Share of neurons that is to fire."),
    ] = 0.25,
    to: Annotated[
        Literal["cut", "relu", "fatrelu", "drelu"],
        typer.Option("--to", rich_help_panel=options.BUILD, help="The new activation; cut loses least."),
    ] = "cut",
    tokens: Annotated[
        int,
        typer.Option("--tokens", metavar="N", min=1, rich_help_panel=options.BUILD, help="Tokens to train on."),
    ] = options.TOKENS,
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank",
            metavar="N",
            min=1,
            rich_help_panel=options.BUILD,
            help="Train patches of this rank, written as one small file too, instead of whole matrices.",
        ),
    ] = None,
    self_generate: Annotated[
        int,
        typer.Option(
            "--self-generate",
            metavar="N",
            min=0,
            rich_help_panel=options.BUILD,
            help="Tokens of chat that the model writes itself, to train on too.",
        ),
    ] = 0,
    chat_share: Annotated[
        float,
        typer.Option(
            "--chat-share",
            metavar="X",
            rich_help_panel=options.BUILD,
            help="Share of training windows from these chats.",
        ),
    ] = 0.5,
    step_tokens: Annotated[
        int,
        typer.Option(
            "--step-tokens", metavar="N", min=1, rich_help_panel=options.BUILD, help="Tokens of one training step."
        ),
    ] = 1024,
    window: Annotated[
        int, typer.Option("--window", min=2, rich_help_panel=options.BUILD, help="Tokens of one text passage.")
    ] = 512,
    lr: Annotated[
        float | None,
        typer.Option(
            "--lr",
            metavar="X",
            rich_help_panel=options.BUILD,
            help="Peak learning rate; without it 3e-4, or 3e-3 with --rank.",
        ),
    ] = None,
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"],
        typer.Option(
            "--precision",
            rich_help_panel=options.BUILD,
            help="Of products; auto: bfloat16 where the machine multiplies it faster.",
        ),
    ] = "auto",
    activation: options.Activation = None,
    seed: options.BuildSeed = options.BUILD_SEED,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a sparse model from a dense one that teaches it; a killed run goes on where it stopped.

    powerinfer sparsify model.gguf --corpus text.txt --active 0.35 -o sparse/

    powerinfer sparsify model/ --corpus a.txt --corpus b.jsonl --self-generate 100000 --rank 32 -o sparse/

    torchrun --nproc-per-node 8 -m powerinfer_tools.cli.main sparsify model/ --corpus text.txt -o sparse/
    """
    from powerinfer_tools import sparsify as library
    from powerinfer_tools.checkpoint import open_checkpoint

    console.console.quiet |= os.environ.get("RANK", "0") != "0"  # of torchrun's processes, the first speaks
    recipe = library.Recipe(
        to, active, tokens, rank, lr, step_tokens, window, self_generate, chat_share, precision, seed
    )
    checkpoint = open_checkpoint(model, activation)
    with console.progress() as progress:
        result = library.sparsify(checkpoint, corpus, output, recipe, force=force, progress=progress, report=_steps())
    if result is None:
        return
    for path in (result.patch, result.chats):
        if path is not None:
            console.wrote(path)
    console.say(f"wrote {output}")
    console.say(f"next: powerinfer build {output} --corpus {corpus[0]} -o {output.name}.gguf", style="cyan")
    if json:
        console.print_json(_document(result))
    else:
        show(result)


def _steps() -> "Callable[[Step], None]":
    """Says a line every 10 s and at the end."""
    said = time.monotonic()

    def report(step: "Step") -> None:
        nonlocal said
        if step.done < step.total and time.monotonic() - said < console.LINE_EVERY:
            return
        said = time.monotonic()
        left = timedelta(seconds=round(step.seconds_left))
        console.say(
            f"{step.done}/{step.total} tokens, loss {step.loss:.3f} (divergence {step.divergence:.3f}), "
            f"active {step.active:.1%}, {step.tokens_per_s:.0f} tokens/s, {left} left"
        )

    return report


def _document(result: "Result") -> dict[str, object]:
    files = {name: str(path) for name, path in (("patch", result.patch), ("chats", result.chats)) if path is not None}
    return {
        "path": str(result.output),
        **files,
        "perplexity_ratio": result.ratio,
        "teacher": asdict(result.teacher),
        "student": asdict(result.student),
    }


def show(result: "Result") -> None:
    """A line a source, then the active share."""
    before, after = result.teacher.perplexity, result.student.perplexity
    rows = [(name, f"{before[name]:.2f}", f"{after[name]:.2f}", f"{after[name] / before[name]:.3f}") for name in before]
    console.table(
        f"perplexity on {result.student.tokens} held-out tokens", ("source", "teacher", "student", "ratio"), rows
    )
    active = result.student.active
    console.write(
        f"active share: mean {sum(active) / len(active):.1%}, layers {min(active):.1%} to {max(active):.1%}\n"
    )
