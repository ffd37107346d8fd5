"""A bound that no plan can beat, whoever made the plan: Lagrange multipliers on the two budgets.

With a price for a byte of vram and of ram, layers no longer compete: each takes the side of its block and the prefixes
that cost it least, and the sum of these minima, less what the budgets are worth, is at most the time of every plan that
fits (weak duality). Blocks are large and cannot be cut, so every number of them in vram is bounded apart.

The longer of a layer's two shares is at least any weighted mean of them, and that mean is a function of k1 plus one of
k2. Both are looked at in KNOTS places; what lies between them is at most `between` better.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

from powerinfer_tools.placement.problem import Budgets, Floats, Ints, Plan, Problem

KNOTS = 256  # a layer
SEARCH = 40  # rounds
STEP, FINEST = 0.3, 0.003  # relative changes of prices, first and last
BISECTIONS = 7  # of the weight of a mean


@dataclass(frozen=True)
class Prices:
    """Seconds that a byte of vram and of ram is worth."""

    vram: float
    ram: float


class Relaxation:
    """One problem under budgets, ready to be bounded for many prices."""

    def __init__(self, problem: Problem, budgets: Budgets) -> None:
        p = self.problem = problem
        self.budgets = budgets
        self.k = _knots(p)
        each = p.each[:, None]
        full = np.full((p.n_layer, 1), p.n_ff)
        self.uses_card = budgets.vram > p.costs.scratch
        self.room = max(0, budgets.vram - p.costs.scratch)
        self.uses_disk = p.machine.disk is not None and budgets.ram is not None and budgets.ram < p.costs.needed
        self.beside = p.beside_bytes(each, self.k)
        self.bundles = p.bundle[:, None] * self.k
        self.in_ram = p.tier_seconds(p.machine.ram, each, self.k)
        self.in_vram = p.tier_seconds(p.vram, each, self.k) if self.uses_card else np.zeros_like(self.in_ram)
        self.shared = np.repeat(p.tier_seconds(p.machine.ram, each, full), self.k.shape[1], axis=1)
        if self.uses_disk:  # all from ram and disk, with [0, k) in ram
            self.shared = self.in_ram + p.disk_seconds(each, full) - p.disk_seconds(each, self.k)
        self.between = self._between()

    def _between(self) -> float:
        """How much a whole number of neurons between two knots can be better than the line between them."""
        p = self.problem
        short = np.array([shortfall(p.fired[i], self.k[i]) for i in range(p.n_layer)])
        per_firing = p.firing_seconds(p.machine.ram) if self.uses_card else np.zeros(p.n_layer)
        if self.uses_disk:
            per_firing = per_firing + p.firing_seconds(p.disk)
        return float((short * per_firing).sum())

    def seconds(self, prices: Prices) -> Floats:
        """Times that no plan within the budgets beats: [head in vram, number of dense blocks in vram]."""
        p = self.problem
        times = self._chain(prices)[-1] - self.between
        if self.budgets.ram is not None:
            fixed = p.costs.host + p.costs.scratch + sum(layer.table for layer in p.costs.layers)
            times -= prices.ram * (self.budgets.ram - fixed)
        return np.asarray(times - prices.vram * self.room)

    def search(self, prices: Prices) -> tuple[float, Plan]:
        """The best bound, in seconds, that a search around some prices finds, and a plan near those that may reach it.

        Each number of blocks in vram has prices of its own: the search raises the lowest of their bounds.
        """
        best = self.seconds(prices)
        found = {cell: (prices, STEP) for cell in np.ndindex(best.shape)}
        for _ in range(SEARCH):
            cell = np.unravel_index(np.argmin(best), best.shape)
            around, step = found[cell]
            if step < FINEST:
                break
            found[cell] = (around, step / 3)
            for vram, ram in product((1 + step, 1, 1 / (1 + step)), repeat=2):
                trial = Prices(around.vram * vram, around.ram * ram)
                times = self.seconds(trial)
                for better in zip(*np.nonzero(times > best), strict=True):
                    found[better] = (trial, max(step, found[better][1]))
                best = np.maximum(best, times)
        cell = np.unravel_index(np.argmin(best), best.shape)
        return float(best[cell]), self._mixed(found[cell][0], *map(int, cell))

    def _mixed(self, prices: Prices, head: int, n_dense: int) -> Plan:
        """So many blocks in vram; of neurons, layer by layer, what it takes just below the prices while vram has room,
        and then just above them.

        At the prices themselves a layer may take little or much at equal cost; the best plan has some of either.
        """
        p = self.problem
        dense = self._trace(prices, head, n_dense)
        (much, much_ram), (little, little_ram) = (
            self._prefixes(Prices(prices.vram * (1 + change), prices.ram), dense)
            for change in (-2 * FINEST, 2 * FINEST)
        )
        sizes = [k1 * p.bundle + p.beside_bytes(p.each, k1) for k1 in (much, little)]
        room = self.room - head * p.costs.head - (p.dense + p.kv)[dense].sum() - sizes[1].sum()
        more = np.cumsum(sizes[0] - sizes[1]) <= room
        return Plan(dense, bool(head), np.where(more, much, little), np.where(more, much_ram, little_ram))

    def _prefixes(self, prices: Prices, dense: npt.NDArray[np.bool_]) -> tuple[Ints, Ints]:
        """The prefixes that cost least beside blocks that are given. They may break the budgets."""
        (_, k1, k2), (_, k1_dense, k2_dense) = (self._layer(prices, side) for side in (False, True))
        k1, k2 = np.where(dense, k1_dense, k1), np.where(dense, k2_dense, k2)
        return k1, np.maximum(k1, k2)

    def _chain(self, prices: Prices) -> list[Floats]:
        """The least cost of layers [0, i) by the side of the last block and the number in vram, for every i; last, with
        the head by its side. The hidden state begins and ends in ram and pays for each change of sides."""
        n = self.problem.n_layer
        sides = np.stack([self._layer(prices, dense)[0] for dense in (False, True)])
        change = self.problem.hand_over_s / 2
        cost = np.full((2, n + 1), np.inf)
        cost[0, 0] = 0.0
        costs = [cost]
        for i in range(n):
            reached = np.minimum(cost, cost[::-1] + change)
            cost = np.stack([reached[0] + sides[0, i], np.append(np.inf, reached[1, :-1] + sides[1, i])])
            costs.append(cost)
        head = np.array(self._head(prices))[:, None]
        return [*costs, np.minimum(cost, cost[::-1] + change) + head]

    def _trace(self, prices: Prices, side: int, n_dense: int) -> npt.NDArray[np.bool_]:
        """Which blocks the cheapest chain with so many of them, and the head on `side`, has in vram."""
        costs = self._chain(prices)
        change = np.array([0.0, self.problem.hand_over_s / 2])
        dense = np.zeros(self.problem.n_layer, bool)
        for i in range(self.problem.n_layer - 1, -1, -1):
            before = costs[i + 1][:, n_dense]
            side = side if before[side] + change[0] <= before[1 - side] + change[1] else 1 - side
            dense[i] = side == 1
            n_dense -= side
        return dense

    def _head(self, prices: Prices) -> tuple[float, float]:
        """The head's cost in ram and in vram."""
        p = self.problem
        on_ram = p.costs.head * (1 / p.machine.ram.sequential + prices.ram)
        if not self.uses_card:
            return on_ram, np.inf
        return on_ram, p.costs.head * (1 / p.vram.sequential + prices.vram) + p.hand_over_s / 2

    def _layer(self, prices: Prices, dense: bool) -> tuple[Floats, Ints, Ints]:
        """The least that each layer can cost with its dense block in vram or in ram, and the prefixes that cost it."""
        p = self.problem
        if dense and not self.uses_card:
            return np.full(p.n_layer, np.inf), p.each, p.each
        tier, price = (p.vram, prices.vram) if dense else (p.machine.ram, prices.ram)
        block = p.dense_seconds(tier) + price * (p.dense + p.kv)
        cost, k1, k2 = self._balanced_ffn(prices, dense)
        if self.uses_card:
            whole = self._whole_ffn(prices, dense)
            k1, k2 = (np.where(whole < cost, p.n_ff, k) for k in (k1, k2))
            cost = np.minimum(cost, whole)
        return block + cost, k1, k2

    def _whole_ffn(self, prices: Prices, dense: bool) -> Floats:
        """Cost of having all neurons in vram, where the processor's share is nothing and no mean is needed."""
        hand_over = 0.0 if dense else self.problem.hand_over_s
        return np.asarray(self.in_vram[:, -1] + hand_over + prices.vram * (self.beside + self.bundles)[:, -1])

    def _balanced_ffn(self, prices: Prices, dense: bool) -> tuple[Floats, Ints, Ints]:
        """The least with the weights of the mean that make it largest: more on the share that is the longer one."""
        low, weight, high = (
            np.zeros(self.problem.n_layer),
            np.zeros(self.problem.n_layer),
            np.ones(self.problem.n_layer),
        )
        cost, k1, k2, excess = self._ffn(prices, dense, weight)
        if not np.any(excess > 0):
            return cost, k1, k2
        for _ in range(BISECTIONS):
            weight = (low + high) / 2
            trial, trial1, trial2, excess = self._ffn(prices, dense, weight)
            better = trial > cost
            cost = np.maximum(cost, trial)
            k1, k2 = np.where(better, trial1, k1), np.where(better, trial2, k2)
            low, high = np.where(excess > 0, weight, low), np.where(excess > 0, high, weight)
        return cost, k1, k2

    def _ffn(self, prices: Prices, dense: bool, weight: Floats) -> tuple[Floats, Ints, Ints, Floats]:
        """Cheapest prefixes, not all neurons in vram: the function of k1 and the one of k2, each at its least.

        Last, by how much the vram share is then longer than the other.
        """
        p, n_ff = self.problem, self.problem.n_ff
        on_card, on_ram = weight[:, None], 1 - weight[:, None]
        of_k2 = on_ram * self.shared + prices.ram * self.bundles
        of_k2 = of_k2 + np.where(self.k < n_ff, p.disk.latency_s if self.uses_disk else np.inf, 0.0)
        of_k1 = prices.ram * (self.beside[:, -1:] - self.beside - self.bundles)
        if self.uses_card:
            both = np.where(dense | (self.k > 0), p.hand_over_s, 0.0)
            of_k1 = of_k1 + on_card * self.in_vram - on_ram * self.in_ram + np.where(self.k < n_ff, both, np.inf)
            of_k1 = of_k1 + prices.vram * (self.beside + self.bundles)
        else:
            of_k1 = np.where(self.k > 0, np.inf, of_k1)
        each = p.each
        at1, at2 = np.argmin(of_k1, axis=1), np.argmin(of_k2, axis=1)
        excess = self.in_vram[each, at1] - (self.shared[each, at2] - self.in_ram[each, at1])
        return of_k1[each, at1] + of_k2[each, at2], self.k[each, at1], self.k[each, at2], excess


def _knots(problem: Problem) -> Ints:
    """[n_layer, n_knots]: places of k1 and k2 that are looked at; every neuron of a small layer."""
    n_ff = problem.n_ff
    if n_ff <= KNOTS:
        return np.tile(np.arange(n_ff + 1), (problem.n_layer, 1))
    rows = []
    for fired, always in zip(problem.fired, problem.always.tolist(), strict=True):
        row = np.union1d(bend_knots(fired, KNOTS, 4), min(always, n_ff))
        rows.append(np.append(row, np.full(2 * KNOTS - len(row), n_ff)))
    k = np.array(rows)
    return k[:, : int((k < n_ff).sum(axis=1).max()) + 1]


def bend_knots(curve: Floats, n: int, group: int) -> Ints:
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
