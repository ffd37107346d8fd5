"""Every flag that commands share, once: its spelling, type, help and default.

A command writes `temp: options.Temp = options.TEMP`. Flags of one command only live in that command's file.
"""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from powerinfer_tools.cli import console

if TYPE_CHECKING:
    from powerinfer_tools.assistant import Settings
    from powerinfer_tools.engine import Sampling

BUILD, SAMPLING, RUN, TEXT, OUTPUT = "Build", "Sampling", "Run", "Prompt", "Output"

_MOST = 1 << 50  # bytes: far beyond any machine, and what every calculation with sizes can hold
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def parse_size(text: str | int) -> int:
    """Bytes of a text like 8GiB, 512MiB, 1.5GB or 4096; a number is returned as it is."""
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?b?", text.strip(), re.IGNORECASE)
    if match is None:
        raise typer.BadParameter(f"expected a size like 8GiB or 512MiB, found {text!r}")
    size = float(match[1]) * _UNITS[(match[2] or "").lower()]
    if size > _MOST:
        raise typer.BadParameter(f"expected at most {_MOST >> 40} TiB, found {text!r}")
    return int(size)


def _quieten(quiet: bool) -> bool:
    console.console.quiet = quiet
    return quiet


def named(model: Path, patch: Path | None) -> str:
    """MODEL and its patch, as the next command takes them."""
    return f"{model} --patch {patch}" if patch else str(model)


def settings(
    sampling: "Sampling", seed: int | None, max_tokens: int | None, stop: list[str] | None, verbose: bool
) -> "Settings":
    """The flags of chat and generate as the library takes them; without --seed one is drawn."""
    from powerinfer_tools.assistant import Settings

    if seed is None:
        seed = int.from_bytes(os.urandom(4), "little")
        if verbose and sampling.temperature > 0:
            console.say(f"seed {seed}", style="dim")
    return Settings(sampling, seed, max_tokens, tuple(stop or ()))


# what commands read
Artifact = Annotated[
    Path,
    typer.Argument(metavar="ARTIFACT", help="An artifact (.gguf) that `powerinfer split` or `build` wrote."),
]
OptionalArtifact = Annotated[
    Path | None,
    typer.Argument(
        metavar="ARTIFACT",
        envvar="POWERINFER_MODEL",
        help="An artifact (.gguf); without it, the default model that `make demo` builds.",
    ),
]
Checkpoint = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A checkpoint: a Hugging Face folder or a GGUF file.")
]
Corpus = Annotated[
    list[Path], typer.Option("--corpus", metavar="FILE", help="Text to read; may be given more than once.")
]
Activations = Annotated[Path, typer.Option("--activations", metavar="FILE", help="What `powerinfer profile` wrote.")]
Predictors = Annotated[Path | None, typer.Option("--predictors", metavar="FILE", help="What `powerinfer train` wrote.")]
Placement = Annotated[Path | None, typer.Option("--placement", metavar="FILE", help="What `powerinfer place` wrote.")]
Machine = Annotated[
    Path | None,
    typer.Option("--machine", metavar="FILE", help="What `powerinfer machine` wrote; without it, measured now."),
]

# how things are built
Activation = Annotated[
    str | None,
    typer.Option(
        "--activation",
        metavar="NAME",
        rich_help_panel=BUILD,
        help="For a GGUF checkpoint that does not record it: relu, relu2, fatrelu:THRESHOLD, drelu or silu.",
    ),
]
Patch = Annotated[
    Path | None,
    typer.Option(
        "--patch",
        metavar="FILE",
        rich_help_panel=BUILD,
        help="What `powerinfer sparsify --rank` wrote; MODEL is then the model that it was trained on.",
    ),
]
Tokens = Annotated[
    int,
    typer.Option("--tokens", metavar="N", min=1, rich_help_panel=BUILD, help="Tokens of the corpus to read."),
]
TOKENS = 32768
Samples = Annotated[
    int,
    typer.Option("--samples", metavar="N", min=1, rich_help_panel=BUILD, help="FFN inputs to keep from each layer."),
]
SAMPLES = 4096
Sparsity = Annotated[
    float | None,
    typer.Option(
        "--sparsity",
        metavar="X",
        min=0.0,
        max=0.99,
        rich_help_panel=BUILD,
        help="Cut the activation so that this share of neurons is skipped (for silu; costs quality).",
    ),
]
Recall = Annotated[
    float,
    typer.Option(
        "--recall",
        metavar="X",
        min=0.0,
        max=1.0,
        rich_help_panel=BUILD,
        help="Least share of firing neurons that a predictor finds.",
    ),
]
RECALL = 0.98
Error = Annotated[
    float,
    typer.Option(
        "--error", metavar="X", min=0.0, rich_help_panel=BUILD, help="Largest relative error of a layer's FFN output."
    ),
]
ERROR = 0.02
Top1 = Annotated[
    float,
    typer.Option(
        "--top1",
        metavar="X",
        min=0.0,
        max=1.0,
        rich_help_panel=BUILD,
        help="Least share of tokens whose likeliest next token all predictors together leave as it is.",
    ),
]
TOP1 = 0.98
Perplexity = Annotated[
    float,
    typer.Option(
        "--perplexity",
        metavar="X",
        min=0.0,
        rich_help_panel=BUILD,
        help="Largest share by which all predictors together raise perplexity.",
    ),
]
PERPLEXITY = 0.005
Quant = Annotated[
    Literal["f32", "f16", "q8_0", "q4_0"],
    typer.Option("--quant", rich_help_panel=BUILD, help="Type of the artifact's matrices."),
]
QUANT: Literal["q4_0"] = "q4_0"
Objective = Annotated[
    Literal["time", "impact"],
    typer.Option(
        "--objective",
        rich_help_panel=BUILD,
        help="Place for the least time a token, or for the paper's sum of firing frequencies.",
    ),
]
OBJECTIVE: Literal["time"] = "time"
Vram = Annotated[
    int,
    typer.Option(
        "--vram",
        parser=parse_size,
        metavar="SIZE",
        rich_help_panel=RUN,
        help="GPU memory to use, like 8GiB, everything counted; 0: no card is touched.",
    ),
]
VRAM = 0
Ram = Annotated[
    int | None,
    typer.Option(
        "--ram",
        parser=parse_size,
        metavar="SIZE",
        rich_help_panel=RUN,
        help="Memory to use, like 12GiB; without it, as much as the model needs.",
    ),
]

# how the engine runs
Threads = Annotated[
    int | None,
    typer.Option(
        "-t",
        "--threads",
        metavar="N",
        min=1,
        max=256,
        envvar="POWERINFER_THREADS",
        rich_help_panel=RUN,
        help="Threads; without it, one a processor.",
    ),
]
CtxSize = Annotated[
    int | None,
    typer.Option(
        "-c",
        "--ctx-size",
        metavar="N",
        min=1,
        rich_help_panel=RUN,
        help="Tokens of context; without it, the model's, 4096 at most.",
    ),
]
Mode = Annotated[
    Literal["sparse", "dense"],
    typer.Option("--mode", rich_help_panel=RUN, help="Compute the neurons that fire, or all of them."),
]
MODE: Literal["sparse"] = "sparse"

# what is said
System = Annotated[
    str | None, typer.Option("--system", metavar="TEXT", rich_help_panel=TEXT, help="The system message.")
]
ChatTemplate = Annotated[
    Path | None,
    typer.Option(
        "--chat-template",
        metavar="FILE",
        rich_help_panel=TEXT,
        help="A jinja chat template instead of the model's.",
    ),
]
NoChatTemplate = Annotated[
    bool,
    typer.Option(
        "--no-chat-template",
        rich_help_panel=TEXT,
        help='Plain "User: … Assistant:" lines instead of a template.',
    ),
]

# how tokens are drawn
MaxTokens = Annotated[
    int | None,
    typer.Option(
        "-n",
        "--max-tokens",
        metavar="N",
        min=1,
        rich_help_panel=SAMPLING,
        help="Tokens of an answer at most; without it, until the model ends or the context is full.",
    ),
]
Temp = Annotated[
    float,
    typer.Option(
        "--temp",
        "--temperature",
        metavar="X",
        min=0.0,
        max=100.0,
        rich_help_panel=SAMPLING,
        help="Temperature; 0 is greedy.",
    ),
]
TEMP = 0.8
TopK = Annotated[
    int,
    typer.Option("--top-k", metavar="N", min=0, rich_help_panel=SAMPLING, help="Draw from the K likeliest; 0 is off."),
]
TOP_K = 40
TopP = Annotated[
    float,
    typer.Option(
        "--top-p",
        metavar="X",
        min=0.0,
        max=1.0,
        rich_help_panel=SAMPLING,
        help="Draw from the likeliest with this total; 1 is off.",
    ),
]
TOP_P = 0.95
MinP = Annotated[
    float,
    typer.Option(
        "--min-p",
        metavar="X",
        min=0.0,
        max=1.0,
        rich_help_panel=SAMPLING,
        help="Leave out what is this much less likely than the best; 0 is off.",
    ),
]
MIN_P = 0.05
RepeatPenalty = Annotated[
    float,
    typer.Option(
        "--repeat-penalty",
        metavar="X",
        min=0.01,
        max=100.0,
        rich_help_panel=SAMPLING,
        help="Penalty on repeats; 1 is off.",
    ),
]
REPEAT_PENALTY = 1.0
RepeatLastN = Annotated[
    int,
    typer.Option(
        "--repeat-last-n", metavar="N", min=0, rich_help_panel=SAMPLING, help="Tokens that the penalty looks at."
    ),
]
REPEAT_LAST_N = 64
SamplingSeed = Annotated[
    int | None,
    typer.Option(
        "-s",
        "--seed",
        metavar="N",
        min=0,
        rich_help_panel=SAMPLING,
        help="Same seed, same answer; without it, drawn (shown with -v).",
    ),
]
BuildSeed = Annotated[
    int, typer.Option("--seed", metavar="N", min=0, rich_help_panel=BUILD, help="Same seed, same file.")
]
BUILD_SEED = 0
Stop = Annotated[
    list[str] | None,
    typer.Option(
        "--stop",
        metavar="TEXT",
        rich_help_panel=SAMPLING,
        help="End the answer here; may be given more than once.",
    ),
]

# what is written
Output = Annotated[
    Path, typer.Option("-o", "--output", metavar="FILE", rich_help_panel=OUTPUT, help="The file to write.")
]
OptionalOutput = Annotated[
    Path | None,
    typer.Option("-o", "--output", metavar="FILE", rich_help_panel=OUTPUT, help="The file to write."),
]
Force = Annotated[bool, typer.Option("--force", rich_help_panel=OUTPUT, help="Replace what the output holds.")]
Json = Annotated[bool, typer.Option("--json", rich_help_panel=OUTPUT, help="Print one JSON document on stdout.")]
Quiet = Annotated[
    bool,
    typer.Option("-q", "--quiet", callback=_quieten, rich_help_panel=OUTPUT, help="No progress and no notes."),
]
Verbose = Annotated[
    bool, typer.Option("-v", "--verbose", rich_help_panel=OUTPUT, help="More on stderr, timings among it.")
]
Timings = Annotated[
    bool,
    typer.Option("--timings", rich_help_panel=OUTPUT, help="Timings at the end on stderr, as llama.cpp prints them."),
]
