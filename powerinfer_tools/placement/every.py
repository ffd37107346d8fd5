"""Every plan of a tiny problem, tried one by one."""

from itertools import product

import numpy as np

from powerinfer_tools.placement.objective import Objective
from powerinfer_tools.placement.problem import Budgets, Ints, Plan, Problem
from powerinfer_tools.placement.search import Found

MOST = 100_000  # prefixes of all layers, for one choice of blocks


def is_tiny(problem: Problem) -> bool:
    """Whether there are few enough plans."""
    pairs = (problem.n_ff + 1) * (problem.n_ff + 2) // 2
    return bool(pairs**problem.n_layer <= MOST)


def best_of_every(problem: Problem, objective: Objective, budgets: Budgets) -> Found:
    """The best of all plans within the budgets."""
    vram, ram = _prefixes(problem, objective)
    found = Found(None, np.inf, np.inf)
    n_blocks = problem.n_layer + 1 if problem.machine.vram else 0
    for blocks in product((False, True), repeat=n_blocks):
        dense = np.array(blocks[: problem.n_layer] or [False] * problem.n_layer)
        head = bool(blocks and blocks[-1])
        plans = Plan(np.broadcast_to(dense, vram.shape), np.full(len(vram), head), vram, ram)
        cost = np.where(problem.fits(plans, budgets), objective.cost(plans), np.inf)
        best = int(np.argmin(cost))
        if cost[best] < found.cost:
            found = Found(plans.at(best), float(cost[best]), float(cost[best]))
    return found


def _prefixes(problem: Problem, objective: Objective) -> tuple[Ints, Ints]:
    """All k1 and k2 that the machine allows, [n, n_layer] each."""
    n, n_ff = problem.n_layer, problem.n_ff
    pairs = np.stack(np.triu_indices(n_ff + 1), axis=1)  # k1 <= k2
    if problem.machine.vram is None:
        pairs = pairs[pairs[:, 0] == 0]
    if problem.machine.disk is None:
        pairs = pairs[pairs[:, 1] == n_ff]
    numbers = np.indices((len(pairs),) * n).reshape(n, -1).T
    vram, ram = pairs[numbers, 0], pairs[numbers, 1]
    worth = np.all((vram == 0) | (vram >= objective.least), axis=1)
    return vram[worth], ram[worth]
