"""Our engine against llama.cpp: the table of what is asked of its speed, measured and filled in by one run.

    python benchmarks/table.py -o speed.json                            # everything, three rounds: under 25 minutes
    python benchmarks/table.py --rows llama --rounds 5 --keep
    python benchmarks/table.py --instructions avx2                      # both sides without AVX-512
    python benchmarks/table.py --llama-bench build/bin/llama-bench      # else it is built first: 10 minutes

Every round runs ours and theirs in turn, each in a process of its own with the model in the page cache; a ratio is the
median of the rounds' ratios, so that the machine's drift meets both alike. The machine must be idle otherwise: a run
that lost more than 5 % of the processors to others is run again (twice at most; the table says how many were), since
llama.cpp, whose threads wait for each other by spinning, suffers most from that.
Decoding is of 96 tokens (the default model: 512) from an empty context, prompts are whole; matrices have the same type
on both sides. Models of planted sparsity (shapes.py) are written below FOLDER, up to 11 GB at a time, and deleted
unless --keep; they take at most 17 GB of memory together with their page cache, for which q8_0 and f16 have fewer
layers. Progress and the table (Markdown) go to stderr, the JSON document to stdout or to the file of -o.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.default import write_requantised, write_uncut
from benchmarks.llamacpp import INSTRUCTIONS, PACKAGE, VERSION, llama_bench
from benchmarks.peers import Figures, ours, theirs, warm
from benchmarks.report import IDLE_SHARE, Findings, Line, Target, document, markdown, write_document
from benchmarks.shapes import SHAPES, Shape, decode_bytes, write_plain, write_shape
from powerinfer_tools.default_model import default_base
from powerinfer_tools.engine.native import KERNELS as NUMBERS
from powerinfer_tools.engine.native import kernels

CACHE = Path(".cache")
DECODE, DECODE_SMALL = 96, 512  # tokens: seconds, since the memory of a shared machine changes its speed within them
PROMPTS = (128, 512)
TRIES = 3  # of a run that others disturb
LAYERS = {"q4_0": 32, "q8_0": 16, "f16": 12}  # both files and a copy of one in memory: three times the model
KERNELS = {"native": "best", "avx2": "avx2"}  # what ours may use, by --instructions


@dataclass
class Bench:
    """How both sides are run, and what was found so far. layers: fewer than LAYERS, to try this out."""

    program: Path
    rounds: int
    threads: int
    folder: Path
    keep: bool
    kernels: str
    layers: int | None = None
    findings: Findings = field(default_factory=Findings)

    def ours(self, model: Path, mode: str, prompt: int = 1, n_decode: int = DECODE, threads: int = 0) -> Figures:
        threads = threads or self.threads
        return ours(model, mode, threads, prompt, n_decode, self.kernels) | {"threads": threads}

    def theirs(self, model: Path, prompts: tuple[int, ...] = (), n_decode: int = DECODE, threads: int = 0) -> Figures:
        return theirs(self.program, model, threads or self.threads, prompts, n_decode)

    @contextmanager
    def file(self, name: str, write: Callable[[Path], None]) -> Iterator[Path]:
        """The file of that name, written where it is not kept from before; in the page cache."""
        path = self.folder / f"{name}.gguf"
        if not (self.keep and path.exists()):
            print(f"writing {path}", file=sys.stderr)
            write(path)
        try:
            warm(path)
            yield path
        finally:
            if not self.keep:
                path.unlink()

    def shape(self, name: str, quant: str) -> Shape:
        return replace(SHAPES[name], n_layer=self.layers or LAYERS[quant])

    @contextmanager
    def files(self, name: str, quant: str, active: float) -> Iterator[tuple[Path, Path]]:
        """The shape as our artifact and as llama.cpp's plain file."""
        shape = self.shape(name, quant)
        stem = f"{name}-{quant}-{shape.n_layer}"
        with (
            self.file(f"{stem}-{active:g}", partial(write_shape, shape, quant, active)) as mine,
            self.file(f"{stem}-plain", partial(write_plain, shape, quant)) as plain,
        ):
            yield mine, plain

    def in_turn(self, runs: dict[str, Callable[[], Figures]]) -> dict[str, list[Figures]]:
        """All runs one after the other, and that again each round."""
        found: dict[str, list[Figures]] = {name: [] for name in runs}
        for i in range(self.rounds):
            for name, run in runs.items():
                figures = self.undisturbed(run)
                found[name].append(figures)
                self.findings.others.append(figures["others"])
                if "ceiling" in figures:
                    self.findings.ceilings.setdefault(int(figures["threads"]), []).append(figures["ceiling"])
                shown = ", ".join(f"{key} {value:.4g}" for key, value in figures.items())
                print(f"round {i + 1} of {self.rounds}, {name}: {shown}", file=sys.stderr)
        return found

    def undisturbed(self, run: Callable[[], Figures]) -> Figures:
        """Of a run that had the machine to itself, or of the last of TRIES."""
        for _ in range(TRIES - 1):
            figures = run()
            if figures["others"] <= IDLE_SHARE:
                return figures
            self.findings.repeated += 1
        return run()

    def add(
        self,
        measure: str,
        ours: list[float],
        theirs: list[float] | None = None,
        target: Target = None,
        unit: str = "tokens/s",
    ) -> None:
        self.findings.lines.append(Line(measure, unit, ours, theirs, target))


def pick(found: list[Figures], key: str = "decode") -> list[float]:
    return [figures[key] for figures in found]


def sparse_lines(bench: Bench, name: str, active: float, found: dict[str, list[Figures]], target: Target) -> None:
    """Sparse decoding against theirs, and its share of the ceiling."""
    sparse, shape = found["ours, sparse"], bench.shape(name, "q4_0")
    bench.findings.models.append(
        {
            "model": f"{name}, {shape.n_layer} layers, q4_0",
            "active_asked": active,
            "active": statistics.median(pick(sparse, "active")),
            "bytes_per_token": statistics.median(pick(sparse, "bytes")),
            "dense_bytes_per_token": decode_bytes(shape, "q4_0"),
        }
    )
    bench.add(f"{name}, {active:.0%} active, decode", pick(sparse), pick(found["theirs"]), target)
    shares = [100 * value for value in pick(sparse, "ceiling_share")]
    bench.add(f"{name}, share of the read ceiling", shares, target=(75, 90), unit="%")


def sparse_row(name: str, active: float, target: Target) -> Callable[[Bench], None]:
    def row(bench: Bench) -> None:
        with bench.files(name, "q4_0", active) as (mine, plain):
            found = bench.in_turn(
                {"ours, sparse": partial(bench.ours, mine, "sparse"), "theirs": partial(bench.theirs, plain)}
            )
        sparse_lines(bench, name, active, found, target)

    return row


def llama_row(bench: Bench) -> None:
    """Sparse and dense decoding, prompts, and one thread against several, of one pair of files."""
    name, active = "llama-2-7b", 0.1
    with bench.files(name, "q4_0", active) as (mine, plain):
        prompts = {f"ours, prompt {n}": partial(bench.ours, mine, "dense", prompt=n, n_decode=1) for n in PROMPTS}
        found = bench.in_turn(
            {
                "ours, sparse": partial(bench.ours, mine, "sparse"),
                "theirs": partial(bench.theirs, plain, prompts=PROMPTS),
                "ours, dense": partial(bench.ours, mine, "dense"),
                "theirs, 1 thread": partial(bench.theirs, plain, threads=1),
                "ours, sparse, 1 thread": partial(bench.ours, mine, "sparse", threads=1),
                **prompts,
            }
        )
    sparse_lines(bench, name, active, found, (2.3, 3.0))
    bench.add("dense decode, q4_0", pick(found["ours, dense"]), pick(found["theirs"]), (1.0, 1.4))
    for n in PROMPTS:
        mine_n, theirs_n = pick(found[f"ours, prompt {n}"], "prompt"), pick(found["theirs"], f"prompt {n}")
        bench.add(f"prompt of {n}, dense, q4_0", mine_n, theirs_n, (1.0, 1.2))
    thread_lines(bench, found)


def thread_lines(bench: Bench, found: dict[str, list[Figures]]) -> None:
    """What further threads gain ours, theirs, and a mere reading of memory, which bounds both."""

    def gain(side: str, key: str = "decode") -> list[float]:
        many, one = pick(found[side], key), pick(found[f"{side}, 1 thread"], key)
        return [a / b for a, b in zip(many, one, strict=True)]

    what = f"{bench.threads} threads against 1"
    bench.add(f"{what}, sparse decode", gain("ours, sparse"), target=(1.7, 1.9), unit="×")
    bench.add(f"{what}, llama.cpp's decode", gain("theirs"), unit="×")
    bench.add(f"{what}, the read ceiling itself", gain("ours, sparse", "ceiling"), unit="×")


def dense_row(quant: str) -> Callable[[Bench], None]:
    def row(bench: Bench) -> None:
        with bench.files("llama-2-7b", quant, 0.1) as (mine, plain):
            found = bench.in_turn(
                {"ours, dense": partial(bench.ours, mine, "dense"), "theirs": partial(bench.theirs, plain)}
            )
        n_layer = bench.shape("llama-2-7b", quant).n_layer
        bench.add(
            f"dense decode, {quant}, {n_layer} layers", pick(found["ours, dense"]), pick(found["theirs"]), (0.95, 1.1)
        )

    return row


def default_row(bench: Bench) -> None:
    """The same weights on both sides, in the same type; and the published file, as users of llama.cpp run it."""
    for quant in ("q4_0", "q8_0"):
        found = default_runs(bench, default_base(), quant)
        for mode in ("dense", "sparse"):
            mine, plain = pick(found[f"ours, {mode}"]), pick(found["theirs"])
            bench.add(f"default model, uncut, {quant}, {mode}", mine, plain, (1.0, 1.5))
        published = pick(found["theirs, published"])
        bench.add(f"default model, uncut, {quant}, against the published q4_1", mine, published)


def default_runs(bench: Bench, source: Path, quant: str) -> dict[str, list[Figures]]:
    warm(source)
    n = DECODE_SMALL
    with (
        bench.file(f"default-{quant}", partial(write_uncut, source, quant)) as mine,
        bench.file(f"default-{quant}-plain", partial(write_requantised, source, quant)) as plain,
    ):
        return bench.in_turn(
            {
                "ours, dense": partial(bench.ours, mine, "dense", n_decode=n),
                "theirs": partial(bench.theirs, plain, n_decode=n),
                "ours, sparse": partial(bench.ours, mine, "sparse", n_decode=n),
                "theirs, published": partial(bench.theirs, source, n_decode=n),
            }
        )


ROWS: dict[str, Callable[[Bench], None]] = {
    "llama": llama_row,
    "mistral": sparse_row("mistral-7b", 0.1, (3.0, 4.0)),
    "opt": sparse_row("opt-6.7b", 0.03, (2.3, 3.0)),
    "q8_0": dense_row("q8_0"),
    "f16": dense_row("f16"),
    "default": default_row,
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Our engine against llama.cpp: the table of speed.")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"which rows, of {','.join(ROWS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("--instructions", choices=INSTRUCTIONS, default="native", help="what both sides may use")
    parser.add_argument("--llama-bench", type=Path, help="the program; else it is built in .cache")
    parser.add_argument("--folder", type=Path, default=CACHE / "shapes", help="where models are written")
    parser.add_argument("--keep", action="store_true", help="keep the models, and use those that were kept")
    parser.add_argument("--layers", type=int, help="models of fewer layers, to try this out")
    parser.add_argument("-o", "--output", type=Path, help="the JSON document's file; else it goes to stdout")
    given = parser.parse_args()
    given.rows = given.rows.split(",")
    if unknown := set(given.rows) - ROWS.keys():
        parser.error(f"--rows: expected some of {', '.join(ROWS)}, found {', '.join(unknown)}")
    return given


def main() -> None:
    given = parse()
    program = given.llama_bench or llama_bench(CACHE / "llama.cpp", given.instructions)
    given.folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(
        program, given.rounds, given.threads, given.folder, given.keep, KERNELS[given.instructions], given.layers
    )
    for row in given.rows:
        ROWS[row](bench)
    print(markdown(bench.findings), file=sys.stderr)
    how = {
        "threads": given.threads,
        "rounds": given.rounds,
        "instructions": given.instructions,
        "kernels": kernels(NUMBERS[bench.kernels]),
        "llama.cpp": "as given" if given.llama_bench else f"{PACKAGE} {VERSION}",
    }
    write_document(how | document(bench.findings), given.output)


if __name__ == "__main__":
    main()
