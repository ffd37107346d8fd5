"""A rival for placement: blocks and groups of neurons by value per byte, each that fits."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from powerinfer_tools.placement.problem import Budgets, Floats, Ints, Plan, Problem

GROUP = 64
HEAD = -1  # the output head's number among the blocks


def greedy(problem: Problem, budgets: Budgets, objective: str) -> Plan:
    """First for vram, then for ram. It need not fit in ram."""
    n = problem.n_layer
    plan = Plan(np.zeros(n, bool), False, np.zeros(n, np.int64), np.full(n, problem.n_ff, np.int64))
    if budgets.vram > problem.costs.card_fixed:
        plan = _fill_vram(problem, plan, budgets.vram - problem.costs.card_fixed, objective)
    return _fill_ram(problem, plan, budgets)


def _fill_vram(problem: Problem, plan: Plan, room: int, objective: str) -> Plan:
    k = _group_ends(problem.n_ff)
    each = problem.each[:, None]
    curve = problem.fired[each, k] if objective == "impact" else problem.tier_seconds(problem.machine.ram, each, k)
    sizes = np.diff(problem.card_bytes(each, k), axis=1)
    vram, blocks = _fill(np.diff(curve, axis=1), sizes, k, room, _blocks(problem, objective))
    if objective == "impact":
        vram[vram < problem.least()] = 0
    dense = np.array([i in blocks for i in range(problem.n_layer)])
    return Plan(dense, HEAD in blocks, vram, np.maximum(plan.ram, vram))


def _blocks(problem: Problem, objective: str) -> dict[int, tuple[float, int]]:
    """(value, bytes) of every dense block and of the head."""
    ram, vram = problem.machine.ram, problem.vram
    saved = problem.dense_seconds(ram) - problem.dense_seconds(vram)
    values = problem.block_impact if objective == "impact" else saved
    blocks = {i: (float(values[i]), int(problem.card_block[i])) for i in range(problem.n_layer)}
    head = problem.head_seconds[0] - problem.head_seconds[1]
    return blocks | {HEAD: (problem.head_impact if objective == "impact" else head, problem.costs.card_head)}


def _fill_ram(problem: Problem, plan: Plan, budgets: Budgets) -> Plan:
    """The same vram, with the ram budget spent on the bundles that fire most."""
    full = replace(plan, ram=np.full(problem.n_layer, problem.n_ff, np.int64))
    if problem.fits(full, budgets) or problem.machine.disk is None:
        return full
    bare = replace(plan, ram=plan.vram)
    room = budgets.ram - problem.bytes(bare)[1]
    k = np.maximum(_group_ends(problem.n_ff)[None], plan.vram[:, None])
    asked = problem.asked(problem.each[:, None], k)
    sizes = np.diff(k, axis=1) * problem.bundle[:, None]
    ram, _ = _fill(np.diff(asked, axis=1) * problem.bundle[:, None], sizes, k, room, {})
    return replace(bare, ram=ram)


def _fill(
    values: Floats, sizes: Ints, k: Ints, room: int, blocks: dict[int, tuple[float, int]]
) -> tuple[Ints, set[int]]:
    """Takes groups [layer, group], in order within a layer, and blocks, by value per byte while there is room."""
    reached = np.broadcast_to(k, (len(values), k.shape[-1]))
    prefix = reached[:, 0].copy()
    taken: set[int] = set()
    open_layers = set(range(len(values)))
    for layer, group in _by_density(values, sizes, blocks):
        size = blocks[layer][1] if group < 0 else int(sizes[layer, group])
        if group >= 0 and layer not in open_layers:
            continue
        if size > room:
            open_layers.discard(layer if group >= 0 else HEAD)
            continue
        room -= size
        if group < 0:
            taken.add(layer)
        else:
            prefix[layer] = reached[layer, group + 1]
    return prefix, taken


def _by_density(values: Floats, sizes: Ints, blocks: dict[int, tuple[float, int]]) -> Iterator[tuple[int, int]]:
    """(layer, group) by falling value per byte, equal ones by number; a block has group -1."""
    n_groups = values.shape[1]
    density = values / np.maximum(sizes, 1)
    density = np.minimum.accumulate(density, axis=1)  # a group is worth no more than the one that must precede it
    numbers = list(blocks)
    of_blocks = np.array([blocks[i][0] / max(1, blocks[i][1]) for i in numbers])
    for item in np.argsort(-np.concatenate([of_blocks, density.ravel()]), kind="stable").tolist():
        if item < len(numbers):
            yield numbers[item], -1
        else:
            yield divmod(item - len(numbers), n_groups)


def _group_ends(n_ff: int) -> Ints:
    return np.append(np.arange(0, n_ff, GROUP), n_ff)
