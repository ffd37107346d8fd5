"""A bound that no plan can beat, whoever made the plan: Lagrange multipliers on the two budgets.

With a price for a byte of vram and of ram, layers no longer compete: each takes the side of its block and the prefixes
that cost it least, and the sum of these minima, less what the budgets are worth, is at most the cost of every plan that
fits (weak duality). Blocks are large and cannot be cut, so every number of them in vram is bounded apart.

The longer of a layer's two shares is at least any weighted mean of them, and that mean is a function of k1 plus one of
k2. Both are looked at in knots; what lies between them is at most `between` better.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

from powerinfer_tools.placement.objective import Objective
from powerinfer_tools.placement.problem import ALL, NONE, SOME, Budgets, Floats, Ints, Problem

KNOTS = 256  # a layer
COARSE = tuple(5.0**i for i in range(-3, 4))  # factors of the mean price where the search starts
SEARCH = 40  # rounds
STEP, FINEST = 1.0, 0.003  # relative changes of prices, first and last
LEAST = 1e-5  # relative gain for which a step is repeated
BISECTIONS = 7  # of the weight of a mean


@dataclass(frozen=True)
class Prices:
    """What a byte of vram and of ram is worth."""

    vram: float
    ram: float


def around(prices: Prices, factors: Sequence[float]) -> list[Prices]:
    """The prices that are not 0 by each of the factors."""
    vram, ram = ([price * f for f in factors] if price > 0 else [0.0] for price in (prices.vram, prices.ram))
    return [Prices(*pair) for pair in product(vram, ram)]


class Relaxation:
    """One problem under budgets, ready to be bounded for many prices."""

    def __init__(self, problem: Problem, objective: Objective, budgets: Budgets) -> None:
        p, self.objective, self.budgets = problem, objective, budgets
        self.problem = problem
        self.k = knots(problem, objective)
        each, full = p.each[:, None], np.full((p.n_layer, 1), p.n_ff)
        self.uses_card = p.machine.vram is not None and budgets.vram > p.costs.scratch
        self.room = max(0, budgets.vram - p.costs.scratch)
        self.limits_ram = budgets.ram < p.costs.needed
        self.uses_disk = self.limits_ram and p.machine.disk is not None
        self.beside = p.beside_bytes(each, self.k)
        self.bundles = p.bundle[:, None] * self.k
        self.in_ram = objective.ram(each, self.k)
        self.in_vram = objective.card(each, self.k) if self.uses_card else np.zeros_like(self.in_ram)
        self.shared = np.repeat(objective.ram(each, full), self.k.shape[1], axis=1)
        if self.uses_disk:  # all from ram and disk, with [0, k) in ram
            self.shared = self.in_ram + objective.disk(each, full) - objective.disk(each, self.k)
        self.between = self._between()

    def _between(self) -> float:
        """How much a whole number of neurons between two knots can be better than the line between them."""
        p = self.problem
        short = np.array([shortfall(p.fired[i], self.k[i]) for i in range(p.n_layer)])
        in_ram, on_disk = self.objective.firing
        return float((short * (in_ram * self.uses_card + on_disk * self.uses_disk)).sum())

    def left_over(self, prices: Prices) -> float:
        """What plans are bounded too high by: the budgets' worth, but for what always stays in ram, and `between`."""
        costs = self.problem.costs
        fixed = costs.host + costs.scratch + sum(layer.table for layer in costs.layers)
        return prices.vram * self.room + prices.ram * (self.budgets.ram - fixed) + self.between

    def bounds(self, prices: Prices) -> Floats:
        """Costs that no plan within the budgets beats: [head in vram, number of dense blocks in vram]."""
        return np.asarray(self._chain(prices) - self.left_over(prices))

    def search(self) -> tuple[Floats, Prices]:
        """The best bounds found, and the prices of the lowest of them, which the search raises."""
        start = self._mean_price()
        best = self.bounds(start)
        found = dict.fromkeys(np.ndindex(best.shape), start)
        steps = dict.fromkeys(found, STEP)

        def look(trials: list[Prices]) -> None:
            for trial in trials:
                bounds = self.bounds(trial)
                for cell in zip(*np.nonzero(bounds > best), strict=True):
                    found[cell], best[cell] = trial, bounds[cell]

        look(around(start, COARSE))
        for _ in range(SEARCH):
            cell = np.unravel_index(np.argmin(best), best.shape)
            before, step = best[cell], steps[cell]
            if step < FINEST:
                break
            look(around(found[cell], (1 / (1 + step), 1.0, 1 + step)))
            if best[cell] <= before + LEAST * abs(before):
                steps[cell] /= 3
        return best, found[np.unravel_index(np.argmin(best), best.shape)]

    def _mean_price(self) -> Prices:
        """What a byte in ram costs in the mean."""
        p, o = self.problem, self.objective
        total = o.ram(p.each, np.full(p.n_layer, p.n_ff)).sum() + o.blocks[0].sum() + o.head[0]
        mean = float(total / p.costs.needed)
        return Prices(mean * self.uses_card, mean * self.limits_ram)

    def _chain(self, prices: Prices) -> Floats:
        """The least cost of all layers and the head: [head in vram, number of blocks in vram]. The hidden state begins
        and ends in ram and pays for each change of sides."""
        n = self.problem.n_layer
        sides = np.stack([self._layer(prices, dense) for dense in (False, True)])
        change = self.objective.hand_over / 2
        cost = np.full((2, n + 1), np.inf)
        cost[0, 0] = 0.0
        for i in range(n):
            reached = np.minimum(cost, cost[::-1] + change)
            cost = np.stack([reached[0] + sides[0, i], np.append(np.inf, reached[1, :-1] + sides[1, i])])
        return np.asarray(np.minimum(cost, cost[::-1] + change) + self.head(prices)[:, None])

    def head(self, prices: Prices) -> Floats:
        """The head's cost in ram and in vram."""
        size, (in_ram, in_vram) = self.problem.costs.head, self.objective.head
        if not self.uses_card:
            return np.array([in_ram + size * prices.ram, np.inf])
        return np.array([in_ram + size * prices.ram, in_vram + size * prices.vram + self.objective.hand_over / 2])

    def _block(self, prices: Prices, dense: bool) -> Floats:
        p = self.problem
        price = prices.vram if dense else prices.ram
        return np.asarray(self.objective.blocks[int(dense)] + price * (p.dense + p.kv))

    def _layer(self, prices: Prices, dense: bool) -> Floats:
        """The least that each layer can cost with its dense block in vram or in ram."""
        if dense and not self.uses_card:
            return np.full(self.problem.n_layer, np.inf)
        cost = self._balanced_ffn(prices, self._starts(dense, None), self._ends(None))
        if self.uses_card:
            cost = np.minimum(cost, self._whole_ffn(prices, dense))
        return self._block(prices, dense) + cost

    def table(self, prices: Prices) -> Floats:
        """The least cost of every layer by what is in vram and on disk: [block, NONE / SOME / ALL, disk, n_layer]."""
        costs = np.full((2, 3, 2, self.problem.n_layer), np.inf)
        for dense, disk in product(range(1 + self.uses_card), range(1 + self.uses_disk)):
            for card in (NONE, SOME)[: 1 + self.uses_card]:
                ffn = self._balanced_ffn(prices, self._starts(bool(dense), card), self._ends(bool(disk)))
                costs[dense, card, disk] = self._block(prices, bool(dense)) + ffn
            if self.uses_card:
                costs[dense, ALL, disk] = self._block(prices, bool(dense)) + self._whole_ffn(prices, bool(dense))
        return costs

    def _starts(self, dense: bool, card: int | None) -> Floats:
        """What k1 costs beside its shares where NONE or SOME neurons are in vram, or either (None)."""
        both = self.objective.hand_over
        if card == SOME:
            return np.where(self.k >= self.objective.least[:, None], both, np.inf)
        none = np.where(self.k == 0, both * dense, np.inf)
        if card == NONE or not self.uses_card:
            return none
        some = (self.k >= self.objective.least[:, None]) & (self.k < self.problem.n_ff)
        return np.where(some, both, none)

    def _ends(self, disk: bool | None) -> Floats:
        """What k2 costs beside its shares where some neurons are on disk, none are, or either (None)."""
        on_disk = np.full(self.k.shape, self.objective.latency if self.uses_disk else np.inf)
        none = np.where(self.k == self.problem.n_ff, 0.0, np.inf)
        if disk is None:
            return np.asarray(np.minimum(on_disk, none))
        return on_disk if disk else none

    def _whole_ffn(self, prices: Prices, dense: bool) -> Floats:
        """Cost of having all neurons in vram, where the processor's share is nothing and no mean is needed."""
        hand_over = 0.0 if dense else self.objective.hand_over
        return np.asarray(self.in_vram[:, -1] + hand_over + prices.vram * (self.beside + self.bundles)[:, -1])

    def _balanced_ffn(self, prices: Prices, starts: Floats, ends: Floats) -> Floats:
        """The least with the weights of the mean that make it largest: more on the share that is the longer one."""
        low = weight = np.zeros(self.problem.n_layer)
        high = low + 1
        cost, excess = self._ffn(prices, starts, ends, weight)
        if not np.any(excess > 0):
            return cost
        for _ in range(BISECTIONS):
            weight = (low + high) / 2
            trial, excess = self._ffn(prices, starts, ends, weight)
            cost = np.maximum(cost, trial)
            low, high = np.where(excess > 0, weight, low), np.where(excess > 0, high, weight)
        return cost

    def _ffn(self, prices: Prices, starts: Floats, ends: Floats, weight: Floats) -> tuple[Floats, Floats]:
        """Cheapest prefixes: the function of k1 and the one of k2, each at its least; and by how much the vram share is
        then longer than the other."""
        each, on_card, on_ram = self.problem.each, weight[:, None], 1 - weight[:, None]
        of_k2 = on_ram * self.shared + prices.ram * self.bundles + ends
        of_k1 = starts + on_card * self.in_vram - on_ram * self.in_ram + prices.vram * (self.beside + self.bundles)
        of_k1 = of_k1 + prices.ram * (self.beside[:, -1:] - self.beside - self.bundles)
        at1, at2 = np.argmin(of_k1, axis=1), np.argmin(of_k2, axis=1)
        excess = self.in_vram[each, at1] - (self.shared[each, at2] - self.in_ram[each, at1])
        return of_k1[each, at1] + of_k2[each, at2], excess


def knots(problem: Problem, objective: Objective) -> Ints:
    """[n_layer, n_knots]: places of k1 and k2 that are looked at; every neuron of a small layer."""
    n_ff = problem.n_ff
    if n_ff <= KNOTS:
        return np.tile(np.arange(n_ff + 1), (problem.n_layer, 1))
    rows = []
    for i in range(problem.n_layer):
        musts = np.minimum([problem.always[i], objective.least[i]], n_ff)
        row = np.union1d(bend_knots(problem.fired[i], KNOTS, 4), musts)
        rows.append(np.append(row, np.full(2 * KNOTS - len(row), n_ff)))
    k = np.array(rows)
    return k[:, : int((k < n_ff).sum(axis=1).max()) + 1]


def bend_knots(curve: Floats, n: int, group: int) -> npt.NDArray[np.int64]:
    """About n + 1 of the points 0, group, 2 group, ... of a curve, ends included, dense where it bends.

    A line between knots errs with the square of their distance times the curve's second derivative, so that knots
    spread by the square root of that derivative; a fifth of them spreads evenly.
    """
    last = len(curve) - 1
    points = np.append(np.arange(0, last, group), last)
    slope = np.diff(curve[points]) / np.diff(points)
    bend = np.sqrt(np.maximum(0.0, -np.diff(slope, append=slope[-1:])))
    weight = np.cumsum(bend + max(float(bend.sum()), 1e-12) / (4 * len(bend)))
    inner = np.searchsorted(weight, weight[-1] * np.arange(1, n) / n)
    return np.unique(np.concatenate([[0], points[inner + 1], [last]]))


def shortfall(curve: Floats, knots: Ints) -> float:
    """The most that straight lines between the knots fall short of a curve."""
    straight = np.interp(np.arange(len(curve)), knots, curve[knots])
    return max(0.0, float(np.max(curve - straight)))
