"""Our `bench` and llama.cpp's `llama-bench` in turn on one shape: medians, spread and ratios.

    python benchmarks/peers.py LLAMA_BENCH llama-2-7b q4_0 0.1 [--rounds 3] [--threads 2] [--folder DIR]

LLAMA_BENCH is the program of that name, built for example from the sources that the package llama-cpp-python carries:

    pip download --no-deps --no-binary :all: llama-cpp-python && tar xf llama_cpp_python-*.tar.gz
    cmake -S llama_cpp_python-*/vendor/llama.cpp -B build -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF
    cmake --build build --target llama-bench

Both files are written to DIR (twice the model's size) where they are not there yet; weights are random, of equal bytes.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.shapes import write_plain, write_shape

PROMPT, DECODE = 128, 32


def ours(path: Path, mode: str, threads: int) -> dict[str, float]:
    """Tokens per second of one run."""
    words = [sys.executable, "-m", "powerinfer_tools.cli.main", "bench", path, "--mode", mode, "--json", "-q"]
    words += ["-t", threads, "--repeats", 1, "--prompt-tokens", PROMPT, "--decode-tokens", DECODE]
    found = json.loads(run(words))
    return {
        "prompt": found["prefill"]["tokens_per_s"],
        "decode": found["decode"]["tokens_per_s"],
        "ceiling_share": found["ceiling_share"],
        "active": found["active_ratio"],
    }


def theirs(program: Path, path: Path, threads: int) -> dict[str, float]:
    """Tokens per second of one run."""
    words = [program, "-m", path, "-t", threads, "-p", PROMPT, "-n", DECODE, "-r", 1, "-o", "json"]
    tests = json.loads(run(words))
    return {"prompt" if test["n_prompt"] else "decode": test["avg_ts"] for test in tests}


def run(words: list[Any]) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{words[0]}: {done.stderr[-500:]}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("llama_bench", type=Path)
    parser.add_argument("shape")
    parser.add_argument("quant")
    parser.add_argument("active", type=float)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    given = parser.parse_args()
    sparse = given.folder / f"{given.shape}-{given.quant}-{given.active}.gguf"
    plain = given.folder / f"{given.shape}-{given.quant}-plain.gguf"
    if not sparse.exists():
        write_shape(given.shape, given.quant, given.active, sparse)
    if not plain.exists():
        write_plain(given.shape, given.quant, plain)
    runs: dict[str, list[dict[str, float]]] = {"sparse": [], "dense": [], "llama.cpp": []}
    for _ in range(given.rounds):  # in turn, so that the machine's drift meets all alike
        runs["sparse"].append(ours(sparse, "sparse", given.threads))
        runs["dense"].append(ours(sparse, "dense", given.threads))
        runs["llama.cpp"].append(theirs(given.llama_bench, plain, given.threads))
    show(runs)


def show(runs: dict[str, list[dict[str, float]]]) -> None:
    """A table on stderr, one JSON document on stdout."""
    result: dict[str, Any] = {}
    for name, found in runs.items():
        for what in ("decode", "prompt"):
            values = [one[what] for one in found]
            median = statistics.median(values)
            ratios = [a[what] / b[what] for a, b in zip(found, runs["llama.cpp"], strict=True)]
            result[f"{name} {what}"] = {"tokens_per_s": median, "min": min(values), "max": max(values)}
            result[f"{name} {what}"]["ratio"] = statistics.median(ratios)
            line = f"{name:10} {what:7} {median:8.2f} tokens/s ({min(values):.2f} to {max(values):.2f})"
            print(f"{line}   {statistics.median(ratios):.2f} x llama.cpp", file=sys.stderr)
    for key in ("ceiling_share", "active"):
        result[key] = statistics.median(one[key] for one in runs["sparse"])
        print(f"sparse {key}: {result[key]:.1%}", file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
