"""Plans that fill a card one item after the other: what every token needs, then the neurons that fire most."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise

from powerinfer_tools.placement.problem import Plan, Problem

Item = tuple[str, int]
BLOCK, NEURONS = "block", "neurons"  # of a layer
HEAD: Item = ("head", 0)


def hottest_first(problem: Problem, vram: int) -> Plan:
    """Output head and dense blocks, then the neurons that fire most, of all layers; nothing on disk."""
    rows = enumerate(bounds(problem))
    heat = {(i, j): _heat(problem, i, a, b) for i, row in rows for j, (a, b) in enumerate(pairwise(row))}
    pieces = sorted(heat, key=lambda piece: -heat[piece])
    return one_by_one(problem, vram, [*blocks(problem), *((NEURONS, i) for i, _ in pieces)])


def one_by_one(problem: Problem, vram: int, items: Iterable[Item]) -> Plan:
    """The items in order, but for those that no longer fit; NEURONS are a layer's next ones, up to its next bound."""
    plan, rows = Plan.in_ram(problem.n_layer, problem.n_ff), bounds(problem)
    for kind, i in items:
        dense, k1 = plan.dense.copy(), plan.vram.copy()
        if kind == BLOCK:
            dense[i] = True
        elif kind == NEURONS:
            k1[i] = next((bound for bound in rows[i] if bound > k1[i]), k1[i])
        fuller = replace(plan, dense=dense, head=bool(plan.head) or (kind, i) == HEAD, vram=k1)
        plan = fuller if problem.bytes(fuller)[0] <= vram else plan
    return plan


def blocks(problem: Problem) -> list[Item]:
    """Head and dense blocks."""
    return [HEAD, *((BLOCK, i) for i in range(problem.n_layer))]


def bounds(problem: Problem) -> list[list[int]]:
    """Of each layer, from 0 on: where the engine can divide its neurons."""
    return [sorted(set(row)) for row in problem.bounds.tolist()]


def _heat(problem: Problem, i: int, begin: int, end: int) -> float:
    """How often a neuron of layer i's [begin, end) fires, on average."""
    return float(problem.fired[i, end] - problem.fired[i, begin]) / (end - begin)
