"""Patterns, and the plan of a pattern: as many neurons as fit, in orders that no budget changes.

A pattern says which blocks are in vram, whether NONE, SOME or ALL of a layer's neurons are, and which layers have some
on disk. So it fixes every hand-over and every latency, and what remains is how many neurons. They enter vram in one
order and ram in another, one by one, up to the first that does not fit.

More memory never makes the plan of a pattern worse. More vram lengthens k1 and frees ram, more of either lengthens k2.
A longer k2 costs nothing, as no bundle is read faster from disk than from ram. Nor does a longer k1 up to its cap: the
card's share is then no longer than the processor's was with one neuron less and nothing on disk; with less in ram the
processor's share is only longer.
"""

from dataclasses import dataclass

import numpy as np

from powerinfer_tools.placement.bound import knots
from powerinfer_tools.placement.objective import Objective
from powerinfer_tools.placement.problem import ALL, SOME, Bools, Budgets, Floats, Ints, Plan, Problem


@dataclass(frozen=True)
class Patterns:
    """Many patterns: head [n]; dense, card (NONE, SOME, ALL), disk [n, n_layer]."""

    head: Bools
    dense: Bools
    card: Ints
    disk: Bools


class Fill:
    """The orders of one problem, and the plans that they make."""

    def __init__(self, problem: Problem, objective: Objective) -> None:
        self.problem, self.objective = problem, objective
        self.k = knots(problem, objective)
        self.caps = self._caps()
        self.vram_order, self.ram_order = _order(self._vram_density()), _order(self._ram_density())

    def plans(self, patterns: Patterns, budgets: Budgets) -> tuple[Plan, Bools]:
        """The plan of each pattern, and whether it fits."""
        plan, fits = self.in_vram(patterns, budgets.vram)
        plan, fit_too = self.with_ram(plan, budgets.ram)
        return plan, fits & fit_too

    def in_vram(self, patterns: Patterns, vram: int) -> tuple[Plan, Bools]:
        """The plan of each pattern with as much as fits in vram, and as little in ram as can be."""
        p, low = self.problem, self.low(patterns.card)
        room = vram - p.bytes(Plan(patterns.dense, patterns.head, low, low))[0]
        cap = np.where(patterns.card == SOME, np.maximum(self.caps, low), low)
        k1 = self._take(self.vram_order, self._per_neuron(), low, cap, room, p.divisible)
        return Plan(patterns.dense, patterns.head, k1, np.where(patterns.disk, k1, p.n_ff)), room >= 0

    def low(self, card: Ints) -> Ints:
        """The fewest neurons of each layer in vram."""
        return np.where(card == ALL, self.problem.n_ff, np.where(card == SOME, self.objective.least, 0))

    def with_ram(self, plan: Plan, ram: int) -> tuple[Plan, Bools]:
        """The plans with as much in ram of what they have on disk as fits, but for a layer's last neuron: that would be
        another pattern; and whether they fit."""
        p = self.problem
        room = ram - p.bytes(plan)[1]
        k2 = self._take(self.ram_order, p.bundle[:, None], plan.ram, np.maximum(plan.ram, p.n_ff - 1), room, True)
        return Plan(plan.dense, plan.head, plan.vram, k2), room >= 0

    def _take(self, order: Ints, sizes: Ints, low: Ints, cap: Ints, room: Ints, divisible: bool) -> Ints:
        """[pattern, layer]: `low` and of the neurons from there to `cap` as many as there is room for, in order.

        divisible: also a part of a segment.
        """
        n_layer, n_segments = self.k.shape[0], self.k.shape[1] - 1
        layer = order // n_segments
        start = np.maximum(self.k[:, :-1].ravel()[order], low[:, layer])
        taken = np.maximum(np.minimum(self.k[:, 1:].ravel()[order], cap[:, layer]) - start, 0)
        size = np.broadcast_to(sizes, (n_layer, n_segments)).ravel()[order]
        used = np.cumsum(taken * size, axis=1)
        stop = np.count_nonzero(used <= room[:, None], axis=1)  # the segment that does not fit as a whole
        rows = np.flatnonzero(stop < len(order))
        at = stop[rows]
        left = room[rows] - (used[rows, at] - taken[rows, at] * size[at])
        taken[np.arange(len(order)) >= stop[:, None]] = 0
        taken[rows, at] = np.maximum(left, 0) // size[at] if divisible else 0
        by_layer = np.empty_like(taken)
        by_layer[:, order] = taken
        return np.asarray(low + by_layer.reshape(-1, n_layer, n_segments).sum(axis=2))

    def _per_neuron(self) -> Ints:
        """[layer, segment]: bytes of a neuron in vram."""
        p = self.problem
        return p.card_neuron[:, None] + (self.k[:, :-1] >= p.always[:, None]) * p.card_predictor[:, None]

    def _ram_density(self) -> Floats:
        """[layer, segment]: what a byte of ram saves."""
        each, o = self.problem.each[:, None], self.objective
        saved = np.diff(o.disk(each, self.k) - o.ram(each, self.k), axis=1)
        return np.asarray(saved / np.maximum(np.diff(self.k, axis=1) * self.problem.bundle[:, None], 1))

    def _caps(self) -> Ints:
        """[layer]: k1 up to which a longer one costs nothing. Halving finds it: the card's share rises with k1, and the
        processor's falls."""
        o, each = self.objective, self.problem.each
        low, high = np.zeros_like(each), np.full_like(each, self.problem.n_ff - 1)
        whole = o.ram(each, high + 1)
        while np.any(low < high):
            k1 = (low + high + 1) // 2
            helps = o.card(each, k1) <= whole - o.ram(each, k1 - 1)
            low, high = np.where(helps, k1, low), np.where(helps, high, k1 - 1)
        if self.problem.divisible:
            return low
        return np.asarray(np.max(np.where(self.k <= low[:, None], self.k, 0), axis=1))

    def _vram_density(self) -> Floats:
        """[layer, segment]: what a byte of vram saves."""
        o, each, k1 = self.objective, self.problem.each[:, None], np.minimum(self.k, self.caps[:, None])
        share = np.maximum(o.card(each, k1), o.ram(each, self.k[:, -1:]) - o.ram(each, k1))
        return np.asarray(-np.diff(share, axis=1) / np.maximum(np.diff(k1, axis=1) * self._per_neuron(), 1))


def _order(density: Floats) -> Ints:
    """Segments by falling density, those of a layer one after the other."""
    falling = np.minimum.accumulate(density, axis=1)
    return np.argsort(-falling.ravel(), kind="stable")
