"""Models larger than memory: ours with --ram against llama.cpp, both in a cgroup of that size.

    python benchmarks/disk.py -o disk.json                          # LLaMA-2-7B and Mistral-7B shapes: half an hour
    python benchmarks/disk.py --shapes llama-2-7b --shares 0.5 --rounds 1 --keep

Matrices in Q4_0, 10 % of the neurons fire, by a power law (shapes.py says what is planted). A share is of the plain
file's size, llama.cpp's; --ram and the cgroup's limit are that many bytes, swap is off, and the files' pages leave the
page cache before every run. Ours and theirs run in turn; a ratio is the median of the rounds' ratios. Where no cgroup
may be made, the script says so: then llama.cpp is not limited and its figures mean nothing.

The tokens of the run that has all in memory are compared by their hash. First token: from the start of the program, in
a cold cache, to its end after one token. Progress and the table (Markdown) go to stderr, JSON to stdout or to -o.
"""

import argparse
import json
import os
import statistics
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.cgroup import run_limited
from benchmarks.llamacpp import llama_bench
from benchmarks.report import machine, write_document
from benchmarks.shapes import SHAPES, write_plain, write_shape

CACHE = Path(".cache")
TARGETS = {  # at least, aim: times llama.cpp
    ("llama-2-7b", 0.7): (12, 20),
    ("llama-2-7b", 0.5): (8, 12),
    ("mistral-7b", 0.7): (12, 20),
    ("mistral-7b", 0.5): (8, 12),
    ("mistral-7b", 0.4): (6, 10),
}
ACTIVE, QUANT = 0.1, "q4_0"
DECODE, DECODE_THEIRS = 32, 8  # tokens; theirs take seconds each
UNLIMITED = 1 << 50


@dataclass
class Bench:
    program: Path | None
    threads: int
    rounds: int

    def ours(self, model: Path, ram: int | None, limit: int) -> dict[str, Any]:
        """The document of our bench."""
        words = [sys.executable, "-m", "powerinfer_tools.cli.main", "bench", str(model), "--json", "-q"]
        words += ["-t", str(self.threads), "--repeats", "1", "--prompt-tokens", "1", "--decode-tokens", str(DECODE)]
        words += ["--ram", str(ram)] if ram is not None else []
        forget(model)
        done = run_limited(words, limit)
        return json.loads(done.output) | {"cgroup_peak_bytes": done.peak_bytes}

    def our_first(self, model: Path, ram: int) -> float:
        """Seconds of a program that says one token."""
        words = [sys.executable, "-m", "powerinfer_tools.cli.main", "generate", str(model), "--ram", str(ram), "-q"]
        forget(model)
        return run_limited(
            [*words, "-t", str(self.threads), "-c", str(DECODE), "--raw", "-p", "a", "-n", "1"], ram
        ).seconds

    def theirs(self, model: Path, limit: int) -> float:
        done = self._llama(model, limit, DECODE_THEIRS)
        return float(json.loads(done.output)[0]["avg_ts"])

    def their_first(self, model: Path, limit: int) -> float:
        return self._llama(model, limit, 1, "--no-warmup").seconds

    def _llama(self, model: Path, limit: int, n: int, *more: str) -> Any:
        words = [str(self.program), "-m", str(model), "-t", str(self.threads), "-p", "0", "-n", str(n), "-r", "1"]
        forget(model)
        # without --repack 0 it copies the weights into memory of its own, and is killed
        return run_limited([*words, "--repack", "0", "-o", "json", *more], limit)

    def share(self, name: str, share: float, mine: Path, plain: Path, resident: list[dict[str, Any]]) -> dict[str, Any]:
        """One line of the table."""
        limit = int(share * plain.stat().st_size)
        sparse, first, their, their_first, in_turn = [], [], [], [], []
        for i in range(self.rounds):
            sparse.append(self.ours(mine, limit, limit))
            if share >= 1:  # where it is to be as fast
                in_turn.append(rate(sparse[-1]) / rate(self.ours(mine, None, UNLIMITED)))
            first.append(self.our_first(mine, limit))
            if self.program is not None:
                their.append(self.theirs(plain, limit))
                their_first.append(self.their_first(plain, limit))
            say(f"{name} at {share:.0%}, round {i + 1} of {self.rounds}: {rate(sparse[-1]):.2f}")
        rates = [rate(found) for found in sparse]
        median = sorted(sparse, key=rate)[len(sparse) // 2]
        return {
            "model": name,
            "share": share,
            "limit_bytes": limit,
            "tokens_per_s": {"ours": rates, "llama.cpp": their},
            "ratio": statistics.median(a / b for a, b in zip(rates, their, strict=True)) if their else None,
            "target": TARGETS.get((name, share)),
            "resident_tokens_per_s": [rate(found) for found in resident],
            "of_resident": in_turn,
            "first_token_s": {"ours": first, "llama.cpp": their_first},
            "cgroup_peak_bytes": [found["cgroup_peak_bytes"] for found in sparse],
            "same_tokens": {found["output_hash"] for found in sparse} == {found["output_hash"] for found in resident},
            "ms_per_token": median["decode"]["ms_per_token"]["p50"],
            "predicted_ms_per_token": median["predicted_ms_per_token"],
            "tiers": median["tiers"],
            "disk": median["disk"],
        }


def rate(found: dict[str, Any]) -> float:
    """Tokens a second that a bench document says."""
    return float(found["decode"]["tokens_per_s"])


def forget(path: Path) -> None:
    """The file's pages leave the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def say(text: str) -> None:
    print(text, file=sys.stderr)


def written(path: Path, write: Any) -> Path:
    if not path.exists():
        say(f"writing {path}")
        write(path)
    return path


def lines(bench: Bench, name: str, shares: list[float], folder: Path, keep: bool) -> list[dict[str, Any]]:
    """The lines of one shape; its files are deleted again unless they are kept."""
    shape = SHAPES[name]
    mine, plain = folder / f"{name}-{QUANT}-{ACTIVE:g}.gguf", folder / f"{name}-{QUANT}-plain.gguf"
    try:
        written(mine, partial(write_shape, shape, QUANT, ACTIVE))
        written(plain, partial(write_plain, shape, QUANT))
        resident = [bench.ours(mine, None, UNLIMITED) for _ in range(bench.rounds)]
        return [bench.share(name, share, mine, plain, resident) for share in shares]
    finally:
        for path in (mine, plain):
            if not keep:
                path.unlink(missing_ok=True)


def markdown(found: list[dict[str, Any]]) -> str:
    columns = (
        "model, RAM of its size, ours (tokens/s), of resident, llama.cpp, ratio, asked / aim, cgroup peak / limit, "
        "prefix / cache / disk, disk a token, waiting, predicted / measured, first token ours / llama.cpp, same tokens"
    )
    rows = [
        "| " + " | ".join(columns.split(", ")) + " |",
        "|" + "---|" * 14,
    ]
    for line in found:
        ours, their = (line["tokens_per_s"][side] for side in ("ours", "llama.cpp"))
        peaks = [peak for peak in line["cgroup_peak_bytes"] if peak is not None]
        disk = line["disk"] or {"bytes_per_token": 0, "reads_per_token": 0, "wait_ms_per_token": 0}
        first = " / ".join(f"{middle(line['first_token_s'][side]):.1f} s" for side in ("ours", "llama.cpp"))
        cells = [
            line["model"],
            f"{line['share']:.0%}",
            f"{middle(ours):.2f}",
            f"{middle(line['of_resident']):.2f}" if line["of_resident"] else "-",
            f"{middle(their):.2f}",
            "-" if line["ratio"] is None else f"{line['ratio']:.1f}",
            "-" if line["target"] is None else " / ".join(f"{x} x" for x in line["target"]),
            f"{max(peaks) / line['limit_bytes']:.1%}" if peaks else "-",
            " / ".join(f"{tier['hits_share']:.0%}" for tier in line["tiers"]),
            f"{disk['bytes_per_token'] / 1e6:.0f} MB in {disk['reads_per_token']:.0f} reads",
            f"{disk['wait_ms_per_token']:.0f} ms",
            f"{line['predicted_ms_per_token']:.0f} / {line['ms_per_token']:.0f} ms",
            first,
            "yes" if line["same_tokens"] else "NO",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def middle(values: list[float]) -> float:
    return statistics.median(values) if values else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["llama-2-7b", "mistral-7b"], choices=SHAPES)
    parser.add_argument("--shares", nargs="+", type=float, help="of the plain file's size; else those that are asked")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-t", "--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, default=CACHE, help="where models are written: 8 GB")
    parser.add_argument("--keep", action="store_true", help="keep the models")
    parser.add_argument("--llama-bench", type=Path, help="else it is built first: 10 minutes")
    parser.add_argument("--ours-only", action="store_true", help="without llama.cpp")
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    program = None if given.ours_only else given.llama_bench or llama_bench(CACHE / "llama.cpp", "native")
    bench = Bench(program, given.threads, given.rounds)
    found = []
    for name in given.shapes:
        shares = given.shares or [*(share for model, share in TARGETS if model == name), 1.0, 1.1]
        found += lines(bench, name, shares, given.folder, given.keep)
    say(markdown(found))
    write_document({"machine": machine({}), "lines": found}, given.output)


if __name__ == "__main__":
    main()
