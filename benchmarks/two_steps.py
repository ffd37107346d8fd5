"""Neurons from disk: gate, up and down in one read, or the gate row first and the rest where it fires?

    python benchmarks/two_steps.py FILE        # any large file on the disk in question; 10 seconds

One layer's reads, of LLaMA-2-7B's rows in Q4_0 (2304 bytes each), by the engine's own reader. A row lies anywhere, so
that a read is as long as the blocks that it touches. The second step waits for the first; a predictor's precision is
the share of what it lets through that fires.
"""

import argparse
import sys
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))

from powerinfer_tools.engine.native import measure_file

ROW, BLOCK = 2304, 512
READS = 360  # of one layer and token at 50 % of memory
PRECISIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)
ROUNDS, SECONDS = 5, 0.1


def blocks(n_bytes: int) -> int:
    """Bytes read for n_bytes that begin anywhere (on 256 bytes), rounded to whole blocks: the mean case or longer."""
    return -(-(n_bytes + BLOCK // 2) // BLOCK) * BLOCK


def seconds(file: int, n_bytes: int, n: int) -> float:
    """Of n reads, from the first to the last."""
    return n * blocks(n_bytes) / measure_file(file, blocks(n_bytes), n, SECONDS)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", type=Path)
    given = parser.parse_args()
    print(f"one read {blocks(3 * ROW)} bytes; first step {blocks(ROW)}, second {blocks(2 * ROW)}; {READS} neurons")
    print("precision  one read  two steps  ratio (min to max)")
    with given.file.open("rb") as opened:
        file = opened.fileno()
        for precision in PRECISIONS:
            ones, twos = [], []
            for _ in range(ROUNDS):  # in turn
                ones.append(seconds(file, 3 * ROW, READS))
                twos.append(seconds(file, ROW, READS) + seconds(file, 2 * ROW, round(precision * READS)))
            ratios = [one / two for one, two in zip(ones, twos, strict=True)]
            print(
                f"{precision:9.0%}  {median(ones) * 1e3:5.2f} ms   {median(twos) * 1e3:5.2f} ms"
                f"   {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            )


if __name__ == "__main__":
    main()
