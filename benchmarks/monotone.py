"""How often more memory makes a placement worse, on small random models with a card, with and without a disk.

    python benchmarks/monotone.py [SECONDS]

Prints for each budget and objective: pairs of budgets tried, pairs whose larger budget gave the worse plan, and by how
much at most. Anything but 0 is a defect: the smaller budget's plan would fit the larger one, too.
"""

import sys
import time
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.placement import Placement
from tests.placement import worlds
from tests.placement.test_place import budgets_of, solve

SHAPES = ((2, 6), (3, 7), (1, 64), (2, 160), (4, 96), (5, 200), (7, 64), (9, 160), (12, 384))
STEPS = (1.0, 0.1, 0.001)  # of all that is needed, by which a budget grows at most


def worse(less: Placement, more: Placement) -> float:
    """By how much the plan with more memory is worse."""
    if less.objective == "time":
        return more.expected_ms / less.expected_ms - 1
    return 1 - more.impact / less.impact if less.impact > 0 else 0.0


def main(seconds: float) -> None:
    draw, end = np.random.default_rng(0), time.monotonic() + seconds
    found: dict[tuple[str, str], list[float]] = {}
    while time.monotonic() < end:
        shape = SHAPES[int(draw.integers(len(SHAPES)))]
        seed, mode = int(draw.integers(1000)), str(draw.choice(["gate", "predictor", "mixed"]))
        objective, has_disk = str(draw.choice(["time", "impact"])), bool(draw.random() < 0.7)
        problem = worlds.problem(*shape, seed, mode, has_disk=has_disk)
        small = budgets_of(problem, 1.2 * draw.random(), draw.random() if has_disk else 1 - 0.3 * draw.random())
        step = float(draw.choice(STEPS)) * draw.random(2) * problem.costs.needed
        grown = {"vram": (int(step[0]), 0), "ram": (0, int(step[1])), "both": (int(step[0]), int(step[1]))}
        placed = partial(solve, shape, seed, mode, objective=objective, has_disk=has_disk)
        try:
            less = placed(small.vram, small.ram)[1]
        except PowerinferError:
            continue  # the smaller budget cannot do
        for budget, (vram, ram) in grown.items():
            more = placed(small.vram + vram, small.ram + ram)[1]
            found.setdefault((budget, objective), []).append(worse(less, more))
    for (budget, objective), by in sorted(found.items()):
        n_worse = sum(each > 1e-9 for each in by)
        print(f"{budget:4} {objective:6} {len(by)} pairs, {n_worse} worse with more, by {max(by):.1e} at most")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 120)
