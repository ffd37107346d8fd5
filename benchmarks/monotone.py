"""How often more memory makes a placement worse, on small random models with a card and a disk.

    python benchmarks/monotone.py [SECONDS]

Prints for each budget and objective: pairs of budgets tried, pairs whose larger budget gave the worse plan, and by how
much at most. Anything but 0 is a defect of the search: the smaller budget's plan would fit the larger one, too.
"""

import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from powerinfer_tools.errors import PowerinferError
from tests.placement import worlds
from tests.placement.test_place import budgets_of, solve


def main(seconds: float) -> None:
    draw, end = np.random.default_rng(0), time.monotonic() + seconds
    found: dict[tuple[str, str], list[float]] = {}
    while time.monotonic() < end:
        shape = (int(draw.integers(2, 13)), int(draw.choice([64, 160, 384])))
        seed, mode = int(draw.integers(100)), str(draw.choice(["gate", "predictor", "mixed"]))
        objective = str(draw.choice(["time", "impact"]))
        low, high = sorted(draw.random(2))
        other = float(draw.random())
        problem = worlds.problem(*shape, seed, mode)
        for budget, pair in (("vram", ((low, other), (high, other))), ("ram", ((0.0, low), (0.0, high)))):
            try:
                less, more = (
                    solve(shape, seed, mode, b.vram, b.ram, objective)[1]
                    for b in (budgets_of(problem, *shares) for shares in pair)
                )
            except PowerinferError:
                continue  # the smaller budget cannot do
            worse = more.expected_ms / less.expected_ms - 1 if objective == "time" else 0.0
            if objective == "impact" and less.impact > 0:
                worse = 1 - more.impact / less.impact
            found.setdefault((budget, objective), []).append(worse)
    for (budget, objective), worse in sorted(found.items()):
        n_worse = sum(w > 1e-9 for w in worse)
        print(f"{budget:4} {objective:6} {len(worse)} pairs, {n_worse} worse with more, by {max(worse):.1%} at most")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 60)
