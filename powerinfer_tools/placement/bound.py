"""A bound that no plan can beat, whoever made the plan: Lagrange multipliers on the two budgets.

With a price for a byte of vram and of ram, layers no longer compete: each takes the side of its block and the prefixes
that cost it least, and the sum of these minima, less what the budgets are worth, is at most the cost of every plan that
fits (weak duality). Blocks are large and cannot be cut, so every number of them in vram is bounded apart.

Curves are looked at in knots and where the shares of card and processor cross; what lies between is at most
`between_ram` or `between_disk` better. With a disk, the longer share is bounded by weighted means of both: those are a function of k1 plus one of k2.
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
        self.stored = self.beside + self.bundles
        self.in_ram = objective.ram(each, self.k)
        self.in_vram = objective.card(each, self.k) if self.uses_card else np.zeros_like(self.in_ram)
        self.longer, self.longer_stored = self._longer()
        self.shared = np.zeros_like(self.in_ram)
        if self.uses_disk:  # all from ram and disk, with [0, k) in ram
            self.shared = self.in_ram + objective.disk(each, full) - objective.disk(each, self.k)
        short = np.array([shortfall(p.fired[i], self.k[i]) for i in range(p.n_layer)])
        self.between_ram, self.between_disk = (short * seconds for seconds in objective.firing)

    def _longer(self) -> tuple[Floats, Floats]:
        """The longer share without a disk and the bytes in vram, at the knots from `least` on and where shares cross."""
        each, processor = self.problem.each, self.in_ram[:, -1:] - self.in_ram
        excess = self.in_vram - processor
        after = np.maximum(np.argmax(excess > 0, axis=1), 1)
        before = after - 1
        rise = excess[each, after] - excess[each, before]
        part = np.clip(np.divide(-excess[each, before], rise, out=np.zeros_like(rise), where=rise > 0), 0, 1)

        def crossing(curve: Floats) -> Floats:
            return curve[each, before] + part * (curve[each, after] - curve[each, before])

        worth = np.c_[self.k, self.k[each, before]] >= self.objective.least[:, None]
        longer = np.c_[np.maximum(self.in_vram, processor), crossing(self.in_vram)]
        return np.where(worth, longer, np.inf), np.c_[self.stored, crossing(self.stored)]

    def worth(self, prices: Prices) -> float:
        """What the budgets are worth, but for what always stays in ram."""
        costs = self.problem.costs
        fixed = costs.host + costs.scratch + sum(layer.table for layer in costs.layers)
        return prices.vram * self.room + prices.ram * (self.budgets.ram - fixed)

    def bounds(self, prices: Prices) -> Floats:
        """Costs that no plan within the budgets beats: [head in vram, number of dense blocks in vram]."""
        return np.asarray(self._chain(prices) - self.worth(prices))

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
        return np.array([in_ram + size * prices.ram, in_vram + size * prices.vram + self.objective.hand_over / 2])

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
            without_disk = self.longer + (prices.vram - prices.ram) * self.longer_stored
            ffn[:, SOME, 0] = without_disk.min(axis=1) + sizes + both - self.between_ram
            ffn[1, ALL] = self.in_vram[:, -1] + prices.vram * self.stored[:, -1]
            ffn[0, ALL] = ffn[1, ALL] + both
        if self.uses_card and self.uses_disk:
            ffn[:, SOME, 1] = self._balanced(prices) + beside - self.between_ram - self.between_disk
            ffn[:, SOME, 1] += self.objective.latency + both
        block_prices = np.array([[prices.ram], [prices.vram]])
        return np.asarray(ffn + (self.objective.blocks + block_prices * (p.dense + p.kv))[:, None, None])

    def _balanced(self, prices: Prices) -> Floats:
        """The least mean of both shares with a disk, with the weights that make it largest: more on the longer one."""
        low = weight = np.zeros(self.problem.n_layer)
        high = low + 1
        cost, excess = self._mean(prices, weight)
        if not np.any(excess > 0):
            return cost
        for _ in range(BISECTIONS):
            weight = (low + high) / 2
            trial, excess = self._mean(prices, weight)
            cost = np.maximum(cost, trial)
            low, high = np.where(excess > 0, weight, low), np.where(excess > 0, high, weight)
        return cost

    def _mean(self, prices: Prices, weight: Floats) -> tuple[Floats, Floats]:
        """The function of k1 and the one of k2, each at its least; and by how much the card's share is then longer."""
        each, on_card, on_ram = self.problem.each, weight[:, None], 1 - weight[:, None]
        of_k1 = on_card * self.in_vram - on_ram * self.in_ram + (prices.vram - prices.ram) * self.stored
        of_k1 = np.where(self.k >= self.objective.least[:, None], of_k1, np.inf)
        of_k2 = on_ram * self.shared + prices.ram * self.bundles
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
