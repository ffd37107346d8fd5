"""Processor and card together: the table of what is asked of them, measured and filled in row by row.

    python benchmarks/gpu.py -o gpu.json                                      # everything
    python benchmarks/gpu.py -o gpu.json --time-limit 540                     # for 9 minutes; the same again: goes on
    python benchmarks/gpu.py -o gpu.json --shapes falcon-40b --quants q4_0 --budgets 0.25 --rounds 5
    python benchmarks/gpu.py -o gpu.json --device host                        # without a card: tries the script out
    python benchmarks/gpu.py -o gpu.json --show                               # the table of what is there

Models of planted sparsity (shapes.py: random weights, only speed means anything), below FOLDER, deleted unless --keep:
the Falcon-40B shape, plain ReLU FFN of n_ff = 4 n_embd beside attention, 5 % active, and LLaMA-2-7B's, 10 % active.
LAYERS says how many layers: fewer than the models have, so that what is run in turn fits into memory together. A budget
is a share of the whole model's weights and KV cache on the card. What does not shrink with them comes on top of that:
the driver's context, scratch, the rests of pages, room for a layer's neurons where prompts lend them.

A row is a model, a budget and a number of threads (all cores, and 8), in a process of its own. In it run in turn, round
by round: the plan that the program finds; our own dense run with whole layers on the card, which is what llama.cpp
does; neurons placed hottest first and at random (gpu_plans.py); the processor alone. Ratios are medians of the rounds'
ratios. Each decodes the same tokens after the same prompt, drawn beforehand, and its logits are compared with the
processor's. On the host device they are equal bit for bit. On a card those of dense runs differ by an NMSE of at most
1e-5 in F16 and 5e-3 in Q4_0, and F16's likeliest tokens are the same but where two are closer than 0.05 standard
deviations of the logits; sparse runs have as many active neurons, within 2 %. Their logits are shown, not judged: what
a planted predictor lets through hangs on the last bit, and one neuron more or less is no small change of a random
model. That sparse runs are right is checked on other models (gpu_runs.py).

Rows are written as they are measured, and a run goes on from what its output already holds. Progress and the table
(Markdown) go to stderr. Exit status: 1 where a row failed or its logits or bytes are off, 3 where rows are left.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import gpu_plans as plans
from benchmarks.gpu_report import Document, markdown, sound
from benchmarks.gpu_row import Case, measure
from benchmarks.peers import warm
from benchmarks.placement import GIB, PC_HIGH
from benchmarks.report import machine
from benchmarks.shapes import SHAPES, Shape, write_shape
from powerinfer_tools.engine.native import describe_card
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.files import atomic_write, sha256_bytes, sha256_file
from powerinfer_tools.placement import Machine
from powerinfer_tools.placement.measure import cores

ACTIVE = {"falcon-40b": 0.05, "llama-2-7b": 0.1, "mistral-7b": 0.1, "opt-6.7b": 0.03}
LAYERS = {"falcon-40b": {"q4_0": 16, "f16": 8}, "llama-2-7b": {"q4_0": 32, "f16": 16}}
DEFAULT_LAYERS = {"q4_0": 32, "f16": 16}
BUDGETS = (0.25, 1.0, 0.1, 0.5, 0.75)  # in the order of what they tell
FEW_THREADS = 8
SIZES_OF_TRIAL: dict[str, Any] = {
    "n_layer": 3,
    "n_embd": 256,
    "n_ff": 1024,
    "n_head": 4,
    "n_head_kv": 2,
    "n_vocab": 320,
}
PROMPT, DECODE = 128, 32  # tokens
PROMPT_TRIAL, DECODE_TRIAL = 24, 8
PAPER_VRAM = 24 * GIB
PAPER_CARD: dict[str, Any] = {
    "n_bytes": PAPER_VRAM,
    "launch_s": 2e-6,
    "copy": 25e9,
    "context": 400 << 20,
}  # assumed, but for n_bytes
LEFT = 3  # exit status


Save = Callable[[], None]
MeasureRow = Callable[[Case, Path, int], dict[str, Any]]


def cases(given: argparse.Namespace) -> list[Case]:
    """All rows that are asked for, those of one file side by side."""
    host = given.device == "host"
    tokens = (PROMPT_TRIAL, DECODE_TRIAL) if host else (PROMPT, DECODE)

    def shape(name: str, quant: str) -> Shape:
        n_layer = LAYERS.get(name, DEFAULT_LAYERS)[quant]
        scaled = replace(SHAPES[name], **(SIZES_OF_TRIAL if host else {"n_layer": n_layer}))
        return replace(scaled, n_layer=given.layers or scaled.n_layer)

    every = product(given.shapes, given.quants, given.budgets, given.threads)
    return [
        Case(shape(name, quant), quant, ACTIVE[name], share, threads, given.device, *tokens)
        for name, quant, share, threads in every
    ]


def fill(document: Document, given: argparse.Namespace, save: Save, row: MeasureRow) -> int:
    """Measures the rows that are asked for and not there yet, and saves after each; returns how many are left."""
    document["foretold"] = foretell(given)
    todo = [case for case in cases(given) if not done(document, case)]
    end, longest = time.monotonic() + given.time_limit, 0.0
    with Files(given.folder, given.keep) as files:
        for at, case in enumerate(todo):
            start = time.monotonic()
            if start + longest > end:
                return len(todo) - at
            say(f"{at + 1} of {len(todo)}: {case.key}")
            document["rows"][case.key] = {"case": asdict(case), **row(case, files.of(case), given.rounds)}
            longest = max(longest, time.monotonic() - start)
            save()
    return 0


class Files:
    """Models, one file at a time."""

    def __init__(self, folder: Path, keep: bool) -> None:
        self.folder, self.keep = folder, keep
        self.path: Path | None = None

    def __enter__(self) -> "Files":
        return self

    def __exit__(self, *error: object) -> None:
        self.drop()

    def of(self, case: Case) -> Path:
        shape = case.shape
        path = self.folder / f"{shape.name}-{shape.n_embd}-{shape.n_layer}-{case.quant}-{case.active:g}.gguf"
        if path != self.path:
            self.drop()
            self.path = path
            if not path.exists():
                say(f"writing {path}")
                self.folder.mkdir(parents=True, exist_ok=True)
                write_shape(shape, case.quant, case.active, path)
            warm(path)
        return path

    def drop(self) -> None:
        if self.path is not None and not self.keep:
            self.path.unlink(missing_ok=True)


def in_a_process(case: Case, model: Path, rounds: int) -> dict[str, Any]:
    """The row, or the error that ended its process: what a card still holds goes with it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(measure, case, model, rounds).result()
        except Exception as error:  # whatever went wrong there, the other rows can be measured
            say(f"FAILED: {error}")
            return {"error": f"{type(error).__name__}: {error}"}


def foretell(given: argparse.Namespace) -> list[dict[str, Any]]:
    """What the time model says of the paper's machine: each model with all its layers, at the shares that its card has
    room for, and with all of the card."""
    assert PC_HIGH.vram is not None
    paper = replace(PC_HIGH, vram=replace(PC_HIGH.vram, **PAPER_CARD))
    found = []
    for name, quant in product(given.shapes, given.quants):
        whole = plans.sparse_problem(SHAPES[name], quant, ACTIVE[name], paper, PROMPT + DECODE)
        budgets = {min(plans.budget(whole, share), PAPER_VRAM) for share in (1, *given.budgets)}
        found += [foretold(paper, name, quant, vram) for vram in sorted(budgets, reverse=True)]
    return found


def foretold(on: Machine, name: str, quant: str, vram: int) -> dict[str, Any]:
    """Ours and whole layers, dense, with so many bytes of the card."""
    shape, active, ctx_size = SHAPES[name], ACTIVE[name], PROMPT + DECODE
    sparse = plans.sparse_problem(shape, quant, active, on, ctx_size)
    dense = plans.dense_problem(shape, quant, on, ctx_size)
    assert on.vram is not None
    return {
        "machine": on.name,
        "bandwidth_ratio": on.vram.sequential / on.ram.sequential,
        "model": f"{name}, {shape.n_layer} layers, {quant}, {active:.0%} active",
        "vram": vram,
        "whole": plans.budget(sparse, 1),
        "ours_ms": float(sparse.seconds(plans.found(sparse, vram))) * 1e3,
        "layers_ms": float(dense.seconds(plans.whole_layers(dense, vram))) * 1e3,
    }


def fresh(device: str) -> Document:
    """A document without rows. From here on this process, and those that it starts, take this device for a card."""
    os.environ["POWERINFER_DEVICE"] = device
    about = {"device": device, "card": describe_card(device)[0], "machine": machine({}), "sources": sources()}
    return about | {"rows": {}, "foretold": []}


def sources() -> str:
    """Digest of the engine's."""
    native = Path(__file__).parents[1] / "native"
    return sha256_bytes(b"".join(sha256_file(path).encode() for path in sorted(native.rglob("*.*"))))[:16]


def opened(output: Path, device: str) -> Document:
    """What the output holds, or a new document. Errors: it holds what was measured elsewhere, or of other sources."""
    document = fresh(device)
    if not output.exists():
        return document
    before = written(output)
    found, expected = (
        f"{one['card']} beside {one['machine']['processor']}, sources {one['sources']}" for one in (before, document)
    )
    if found != expected:
        raise PowerinferError(f"{output}: expected figures of {expected}, found those of {found}", "mismatch")
    return before


def written(output: Path) -> Document:
    """What an earlier run left. Errors: nothing, or no JSON."""
    try:
        document: Document = json.loads(output.read_text())
    except (OSError, ValueError) as error:
        raise PowerinferError(f"{output}: expected the JSON of an earlier run, found {error}", "usage") from error
    return document


def done(document: Document, case: Case) -> bool:
    """Whether its row was measured without an error."""
    return "error" not in document["rows"].get(case.key, {"error": "not measured"})


def write(document: Document, output: Path) -> None:
    with atomic_write(output, force=True) as file:
        file.write((json.dumps(document, indent=1) + "\n").encode())


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which rows, and how they are measured."""
    n = cores()
    parser.add_argument("--device", choices=("cuda", "host"), default="cuda", help="host: a thread in place of a card")
    parser.add_argument("--shapes", nargs="+", default=list(LAYERS), choices=ACTIVE)
    parser.add_argument("--quants", nargs="+", default=["q4_0", "f16"], choices=("q4_0", "f16"))
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS), help="shares of the model")
    parser.add_argument("-t", "--threads", nargs="+", type=int, default=sorted({n, min(FEW_THREADS, n)}, reverse=True))
    parser.add_argument("--layers", type=int, help="of every model, in place of what LAYERS says")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--time-limit", type=float, default=float("inf"), help="seconds: what would end later waits")
    parser.add_argument("--folder", type=Path, default=Path(".cache/shapes"), help="where models are written: 14 GB")
    parser.add_argument("--keep", action="store_true", help="keep the models")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_options(parser)
    parser.add_argument("--show", action="store_true", help="measure nothing")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the JSON document")
    return parser.parse_args()


def main() -> int:
    given = parse()
    try:
        if given.show:
            print(markdown(written(given.output)))
            return 0
        document = opened(given.output, given.device)
    except PowerinferError as error:
        say(str(error))
        return 1
    left = fill(document, given, lambda: write(document, given.output), in_a_process)
    write(document, given.output)
    say(markdown(document))
    if left:
        say(f"{left} rows are left: the same command goes on")
        return LEFT
    return 0 if all(sound(row) for row in document["rows"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
