"""A bound that no plan can beat, whoever made the plan: Lagrange multipliers on the two budgets.

With a price for a byte of vram and of ram, layers no longer compete: each takes the side of its block and the prefixes
that cost it least, and the sum of these minima, less what the budgets are worth, is at most the cost of every plan that
fits (weak duality). Blocks are large and cannot be cut, so every number of them in vram is bounded apart.

The longer of a layer's two shares is at least any weighted mean of them, and that mean is a function of k1 plus one of
k2. Both are looked at in knots; what lies between them is at most `between_ram` or `between_disk` better.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

from powerinfer_tools.placement.objective import Objective
from powerinfer_tools.placement.problem import ALL, NONE, SOME, Budgets, Floats, Ints, Problem

KNOTS = 256  # a layer
STEPS = tuple(1 + 0.7**n for n in range(-3, 16))  # factors of prices, one round each
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
        self.uses_card = p.machine.vram is not None and budgets.vram > p.costs.card_fixed
        self.room = max(0, budgets.vram - p.costs.card_fixed)
        self.limits_ram = budgets.ram < p.costs.needed
        self.uses_disk = self.limits_ram and p.machine.disk is not None
        self.beside = p.beside_bytes(each, self.k)
        self.bundles = p.bundle[:, None] * self.k
        self.stored, self.on_card = self.beside + self.bundles, p.card_bytes(each, self.k)
        self.in_ram = objective.ram(each, self.k)
        self.in_vram = objective.card(each, self.k) if self.uses_card else np.zeros_like(self.in_ram)
        self.shared = self.in_ram
        if self.uses_disk:  # all from ram and disk, with [0, k) in ram
            self.shared = self.in_ram + objective.disk(each, full) - objective.disk(each, self.k)
        self.between_ram, self.between_disk = np.array([objective.short(i, k) for i, k in enumerate(self.k)]).T
        if not p.divisible:
            self.between_ram = np.zeros(p.n_layer)

    def worth(self, prices: Prices) -> float:
        """What the budgets are worth, but for what always stays in ram."""
        costs = self.problem.costs
        fixed = costs.host + costs.scratch + sum(layer.table for layer in costs.layers)
        return prices.vram * self.room + prices.ram * (self.budgets.ram - fixed)

    def bounds(self, prices: Prices) -> Floats:
        """Costs that no plan within the budgets beats: [head in vram, number of dense blocks in vram]."""
        return np.asarray(self._chain(prices) - self.worth(prices))

    def search(self, start: Prices) -> tuple[Floats, Prices]:
        """The best bounds found from some prices on, and the prices of the lowest of them, which the search raises."""
        tried: dict[Prices, Floats] = {}
        trials = around(start, (1.0, 0.0))
        for step in STEPS:
            tried |= {prices: self.bounds(prices) for prices in trials if prices not in tried}
            best = np.max(list(tried.values()), axis=0)
            lowest = np.unravel_index(np.argmin(best), best.shape)
            prices = max(tried, key=lambda prices: float(tried[prices][lowest]))
            trials = around(prices, (1 / step, 1.0, step))
        return best, prices

    def mean_price(self) -> Prices:
        """What a byte in ram costs in the mean: where to start when nothing is known."""
        mean = self.objective.all_in_ram(self.problem) / self.problem.costs.needed
        return Prices(mean * self.uses_card, mean * self.limits_ram)

    def _chain(self, prices: Prices) -> Floats:
        """The least cost of all layers and the head: [head in vram, number of blocks in vram]. The hidden state begins
        and ends in ram and pays for each change of sides."""
        n = self.problem.n_layer
        sides = self.table(prices).min(axis=(1, 2))
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
        in_vram += self.problem.costs.card_head * prices.vram + self.objective.hand_over / 2
        return np.array([in_ram + size * prices.ram, in_vram])

    def table(self, prices: Prices) -> Floats:
        """The least cost of every layer by what is in vram and on disk: [block, NONE / SOME / ALL, disk, layer]."""
        p, both = self.problem, self.objective.hand_over
        sizes, beside = prices.ram * self.stored[:, -1], prices.ram * self.beside[:, -1]
        ffn = np.full((2, 3, 2, p.n_layer), np.inf)
        ffn[0, NONE, 0] = self.in_ram[:, -1] + sizes
        if self.uses_disk:
            ffn[0, NONE, 1] = (self.shared + prices.ram * self.bundles).min(axis=1) + beside - self.between_disk
            ffn[0, NONE, 1] += self.objective.latency
        if self.uses_card:
            ffn[1, NONE] = ffn[0, NONE] + both
            ffn[:, SOME, 0] = self._balanced(prices, slice(-1, None)) + beside + both - self.between_ram
            ffn[1, ALL] = self.in_vram[:, -1] + prices.vram * self.on_card[:, -1]
            ffn[1, ALL, :, self.objective.least > p.n_ff] = np.inf
            ffn[0, ALL] = ffn[1, ALL] + both
        if self.uses_card and self.uses_disk:
            ffn[:, SOME, 1] = self._balanced(prices, slice(None)) + beside - self.between_ram - self.between_disk
            ffn[:, SOME, 1] += self.objective.latency + both
        blocks = self.objective.blocks + np.stack([prices.ram * p.block, prices.vram * p.card_block])
        return np.asarray(ffn + blocks[:, None, None])

    def _balanced(self, prices: Prices, ends: slice) -> Floats:
        """The least mean of both shares, k2 at these knots, with the weights that make it largest."""
        low = weight = np.zeros(self.problem.n_layer)
        high = low + 1
        cost, excess = self._mean(prices, ends, weight)
        if not np.any(excess > 0):
            return cost
        for _ in range(BISECTIONS):
            weight = (low + high) / 2
            trial, excess = self._mean(prices, ends, weight)
            cost = np.maximum(cost, trial)
            low, high = np.where(excess > 0, weight, low), np.where(excess > 0, high, weight)
        return np.asarray(cost)

    def _mean(self, prices: Prices, ends: slice, weight: Floats) -> tuple[Floats, Floats]:
        """The function of k1 and the one of k2, each at its least; and by how much the card's share is then longer."""
        each, on_card, on_ram = self.problem.each, weight[:, None], 1 - weight[:, None]
        of_k1 = on_card * self.in_vram - on_ram * self.in_ram
        of_k1 = of_k1 + prices.vram * self.on_card - prices.ram * self.stored
        of_k1 = np.where(self.k >= self.objective.least[:, None], of_k1, np.inf)
        of_k2 = (on_ram * self.shared + prices.ram * self.bundles)[:, ends]
        at1, at2 = np.argmin(of_k1, axis=1), np.argmin(of_k2, axis=1)
        excess = self.in_vram[each, at1] - (self.shared[:, ends][each, at2] - self.in_ram[each, at1])
        return of_k1[each, at1] + of_k2[each, at2], excess


def knots(problem: Problem, objective: Objective) -> Ints:
    """[n_layer, n_knots]: places of k1 and k2 that are looked at; every neuron of a small layer; all that k1 may be."""
    n_ff = problem.n_ff
    if not problem.divisible:
        return problem.bounds
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
