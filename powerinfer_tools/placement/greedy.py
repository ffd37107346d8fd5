"""Placement without a solver: by value per byte; and the last neurons of any plan, one by one."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from powerinfer_tools.placement.problem import Budgets, Floats, Ints, Plan, Problem

GROUP = 64
HEAD = -1  # the output head's number among the blocks


def greedy(problem: Problem, budgets: Budgets, objective: str) -> Plan:
    """Blocks and groups of neurons by value per byte, first for vram, then for ram. It need not fit in ram."""
    n = problem.n_layer
    plan = Plan(np.zeros(n, bool), False, np.zeros(n, np.int64), np.full(n, problem.n_ff, np.int64))
    if budgets.vram > problem.costs.scratch:
        plan = _fill_vram(problem, plan, budgets.vram - problem.costs.scratch, objective)
    return fill_ram(problem, plan, budgets)


def _fill_vram(problem: Problem, plan: Plan, room: int, objective: str) -> Plan:
    k = _group_ends(problem.n_ff)
    each = problem.each[:, None]
    curve = problem.fired[each, k] if objective == "impact" else problem.tier_seconds(problem.machine.ram, each, k)
    sizes = np.diff(problem.beside_bytes(each, k) + problem.bundle[:, None] * k, axis=1)
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
    blocks = {i: (float(values[i]), int(problem.dense[i] + problem.kv[i])) for i in range(problem.n_layer)}
    head = problem.costs.head * (1 / ram.sequential - 1 / vram.sequential)
    return blocks | {HEAD: (problem.head_impact if objective == "impact" else head, problem.costs.head)}


def fill_ram(problem: Problem, plan: Plan, budgets: Budgets) -> Plan:
    """The same vram, with the ram budget spent on the bundles that fire most."""
    full = replace(plan, ram=np.full(problem.n_layer, problem.n_ff, np.int64))
    if problem.fits(full, budgets) or problem.machine.disk is None:
        return full
    bare = replace(plan, ram=plan.vram)
    room = (budgets.ram or 0) - problem.bytes(bare)[1]
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


def refine(problem: Problem, plan: Plan, budgets: Budgets, objective: str) -> Plan:
    """Moves neurons across the ends of the prefixes while that gains and fits, in steps down to one neuron."""
    if objective == "impact":
        for step in (GROUP, 8, 1):
            plan = _add_impact(problem, plan, budgets, step)
        return fill_ram(problem, plan, budgets)
    for step in (GROUP, 8, 1):
        plan = _climb(problem, plan, budgets, step)
    return plan


def trim(problem: Problem, plan: Plan, budgets: Budgets) -> Plan:
    """The plan without the neurons that are least worth their bytes, until it fits or none is left to give."""
    for step in (8 * GROUP, GROUP, 1):
        for change, tier, budget in (((-step, 0), 0, budgets.vram), ((0, -step), 1, budgets.ram)):
            move = _Move(problem, plan, *change)
            while budget is not None and problem.bytes(plan)[tier] > budget:
                freed = -(move.card if tier == 0 else move.ram)
                if step > 1:  # no more than is needed
                    freed = np.where(freed <= problem.bytes(plan)[tier] - budget, freed, 0)
                worth = np.where(freed > 0, move.gain / np.maximum(freed, 1), -np.inf)
                i = int(np.argmax(worth))
                if freed[i] <= 0:
                    break
                plan = plan.with_layer(i, int(move.k1[i]), int(move.k2[i]))
                move.update(plan, i)
    return plan


def _add_impact(problem: Problem, plan: Plan, budgets: Budgets, step: int) -> Plan:
    if budgets.vram <= problem.costs.scratch:
        return plan
    least = problem.least()
    while True:
        k1 = plan.vram + step
        size = (
            step * problem.bundle
            + problem.beside_bytes(problem.each, k1)
            - problem.beside_bytes(problem.each, plan.vram)
        )
        room = budgets.vram - max(problem.bytes(plan)[0], problem.costs.scratch)
        allowed = (k1 <= problem.n_ff) & (k1 >= least) & (size <= room)
        if not allowed.any():
            return plan
        reached = np.minimum(k1, problem.n_ff)
        gain = np.where(
            allowed, (problem.fired[problem.each, reached] - problem.fired[problem.each, plan.vram]) / size, -1.0
        )
        i = int(np.argmax(gain))
        plan = plan.with_layer(i, int(k1[i]), max(int(plan.ram[i]), int(k1[i])))


def _climb(problem: Problem, plan: Plan, budgets: Budgets, step: int) -> Plan:
    """The best move per byte, again and again: a prefix of vram longer or shorter by `step`, or one of ram longer."""
    moves = [_Move(problem, plan, *change) for change in ((step, 0), (-step, 0), (0, step))]
    card, ram, _ = problem.bytes(plan)
    card = max(card, problem.costs.scratch)
    for _ in range(20 * problem.n_layer):
        best: tuple[float, int, _Move] | None = None
        for move in moves:
            fits = (move.card <= budgets.vram - card) & (budgets.ram is None or move.ram <= budgets.ram - ram)
            worth = np.where(
                fits & (move.gain > 1e-15), move.gain / np.maximum(1, np.maximum(move.card, move.ram)), 0.0
            )
            i = int(np.argmax(worth))
            if worth[i] > 0 and (best is None or worth[i] > best[0]):
                best = (float(worth[i]), i, move)
        if best is None:
            break
        _, i, move = best
        card, ram = card + int(move.card[i]), ram + int(move.ram[i])
        plan = plan.with_layer(i, int(move.k1[i]), int(move.k2[i]))
        for move in moves:
            move.update(plan, i)
    return plan


class _Move:
    """One change of every layer's prefixes: what it gains (seconds) and what it adds to vram and ram."""

    def __init__(self, problem: Problem, plan: Plan, card: int, memory: int) -> None:
        self.problem, self.change = problem, (card, memory)
        n = problem.n_layer
        self.k1, self.k2, self.card, self.ram = (np.zeros(n, np.int64) for _ in range(4))
        self.gain = np.zeros(n)
        for i in range(n):
            self.update(plan, i)

    def update(self, plan: Plan, i: int) -> None:
        """Reckons layer i anew."""
        p = self.problem
        k1, k2 = int(plan.vram[i]), int(plan.ram[i])
        new1 = k1 + self.change[0]
        new2 = max(new1, k2 + self.change[1])
        self.card[i] = self.ram[i] = self.gain[i] = 0
        if not 0 <= new1 <= new2 <= p.n_ff or (self.change[1] < 0 and k2 + self.change[1] < k1):
            return
        if (new1 > 0 and p.machine.vram is None) or (new2 < p.n_ff and p.machine.disk is None):
            return
        dense = plan.dense[i]
        before, after = p.layer_seconds(i, dense, np.array([k1, new1]), np.array([k2, new2]))
        beside = int(p.beside_bytes(i, new1) - p.beside_bytes(i, k1))
        self.k1[i], self.k2[i], self.gain[i] = new1, new2, before - after
        self.card[i] = (new1 - k1) * p.bundle[i] + beside
        self.ram[i] = ((new2 - new1) - (k2 - k1)) * p.bundle[i] - beside
