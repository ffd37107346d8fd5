"""The patterns that are tried, whatever the budgets.

As the price of vram falls, a layer's neurons go from NONE to SOME to ALL in vram, each step at a price of its own; the
steps of all layers, by that price, make a chain of patterns. As the price of ram falls, layers leave the disk one after
the other. Tried are the places of these chains and, around each place, one step more or less: that reaches what no
price does. Where layers are FEW, every pattern is tried.
"""

from itertools import product

import numpy as np

from powerinfer_tools.placement.fill import WHOLE, Fill
from powerinfer_tools.placement.problem import ALL, NONE, SOME, Bools, Floats, Ints

FEW = 5
WINDOW = 2  # steps before and after a place of a chain that are undone and done
PRICES = 12  # of vram, at which the blocks are chosen


class Family:
    """The patterns of one problem: what is in vram, by cell (head, number of dense blocks there), and on disk."""

    def __init__(self, fill: Fill) -> None:
        self.fill, self.problem, self.objective = fill, fill.problem, fill.objective
        p, o, k = self.problem, self.objective, fill.k
        each = p.each[:, None]
        self.few = p.n_layer <= FEW
        self.stored = p.bundle[:, None] * k + p.beside_bytes(each, k)
        curves = (o.ram, o.disk) if p.machine.disk else (o.ram,)
        self.shares = [  # [layer, knot]: all else is in ram, or on disk
            np.maximum(o.card(each, k), curve(each, k[:, -1:]) - curve(each, k)) for curve in curves
        ]
        self.steps = [[self._vram_steps(share, dense) for dense in (False, True)] for share in self.shares]
        self.disks = self._disks()
        self._costs = [] if self.few else self._chain()

    def cell(self, head: bool, n_dense: int) -> tuple[Bools, Ints]:
        """What is in vram in a cell's patterns: (dense, card), each [n, n_layer]."""
        dense = self._every_choice(n_dense) if self.few else self._cheapest(head, n_dense)
        if not len(dense):
            return dense, np.zeros(dense.shape, np.int64)
        cards = [self._cards(blocks) for blocks in dense]
        return np.repeat(dense, [len(card) for card in cards], axis=0), np.concatenate(cards)

    def _every_choice(self, n_dense: int) -> Bools:
        every = np.array(list(product((False, True), repeat=self.problem.n_layer)))
        return np.asarray(every[every.sum(axis=1) == n_dense])

    def _cards(self, dense: Bools) -> Ints:
        n = self.problem.n_layer
        if self.few:
            return self._worth(np.array(list(product((NONE, SOME, ALL), repeat=n))))
        found = [np.full((1, n), SOME)]
        for by_side in self.steps:
            prices = np.where(
                dense[:, None], by_side[1], by_side[0]
            ).ravel()  # two steps of layer 0, two of layer 1, ...
            done = _around_chain(np.argsort(-prices, kind="stable")).reshape(-1, n, 2)
            found.append(np.where(done[..., 1], ALL, np.where(done[..., 0], SOME, NONE)))
        return self._worth(np.concatenate(found))

    def _worth(self, card: Ints) -> Ints:
        """The different ones, without what is never worth being in vram."""
        least, n_ff = self.objective.least, self.problem.n_ff
        never = np.where(card == SOME, least >= n_ff, least > n_ff)
        return np.unique(np.where(never, NONE, card), axis=0)

    def _vram_steps(self, share: Floats, dense: bool) -> Floats:
        """[layer, 2]: the prices of vram below which SOME and ALL of its neurons are worth their bytes."""
        o, k = self.objective, self.fill.k[:, :-1]
        size, whole_size = np.maximum(self.stored[:, :-1], 1), self.stored[:, -1]
        some = np.where(k >= o.least[:, None], share[:, :-1] + o.hand_over, np.inf)
        none, whole = share[:, 0] + o.hand_over * dense, share[:, -1] + o.hand_over * (not dense)
        to_some = np.max((none[:, None] - some) / size, axis=1)
        to_whole = np.min((some - whole[:, None]) / np.maximum(whole_size[:, None] - size, 1), axis=1)
        at_once = (none - whole) / whole_size
        return np.stack([np.maximum(to_some, at_once), np.minimum(to_whole, at_once)], axis=1)

    def _disks(self) -> Bools:
        """[n, n_layer]: which layers have neurons on disk."""
        n = self.problem.n_layer
        if self.problem.machine.disk is None:
            return np.zeros((1, n), bool)
        if not self.objective.firing[1].any():  # nothing is gained by one layer's bundles rather than another's
            return np.array([[False] * n, [True] * n])
        if self.few:
            return np.array(list(product((False, True), repeat=n)))
        starts = np.zeros(n, np.int64), self.fill.caps[WHOLE]
        chains = [_around_chain(np.argsort(-self._ram_steps(start), kind="stable")) for start in starts]
        return np.unique(~np.concatenate(chains), axis=0)

    def _ram_steps(self, start: Ints) -> Floats:
        """[layer]: the prices of ram below which none of its neurons stays on disk, with `start` of them in vram."""
        o, k, p = self.objective, self.fill.k, self.problem
        each = p.each[:, None]
        slower = o.disk(each, k) - o.ram(each, k)
        saved = (slower[:, -1:] - slower + o.latency) / np.maximum((p.n_ff - k) * p.bundle[:, None], 1)
        left = (k >= start[:, None]) & (k < p.n_ff)
        return np.asarray(np.min(np.where(left, saved, np.inf), axis=1))

    def _chain(self) -> list[Floats]:
        """The least cost of layers [0, i), for every i: [price, side of the last block, number of blocks in vram]."""
        n = self.problem.n_layer
        offered = np.concatenate([steps.ravel() for by_side in self.steps for steps in by_side])
        prices = np.append(np.quantile(offered[np.isfinite(offered)], np.linspace(0, 1, PRICES)), 0.0)
        layers = np.concatenate([self._layers(share, prices) for share in self.shares])
        cost = np.full((len(layers), 2, n + 1), np.inf)
        cost[:, 0, 0] = 0.0
        costs = [cost]
        for i in range(n):
            reached = np.minimum(cost, cost[:, ::-1] + self.objective.hand_over / 2) + layers[:, :, i, None]
            cost = np.full_like(cost, np.inf)
            cost[:, 0], cost[:, 1, 1:] = reached[:, 0], reached[:, 1, :-1]
            costs.append(cost)
        return costs

    def _layers(self, share: Floats, prices: Floats) -> Floats:
        """[price, side of its block, layer]: the least cost of a layer."""
        p, o, k = self.problem, self.objective, self.fill.k
        sides = []
        for dense in (False, True):
            both = ((k >= o.least[:, None]) | dense) & ((k < p.n_ff) | (not dense))
            ffn = share + np.where(both, o.hand_over, 0.0)
            ffn = np.array([(ffn + price * self.stored).min(axis=1) for price in prices])
            sides.append(ffn + o.blocks[int(dense)] + prices[:, None] * (p.dense + p.kv) * dense)
        return np.stack(sides, axis=1)

    def _cheapest(self, head: bool, n_dense: int) -> Bools:
        """[n, n_layer]: so many dense blocks in vram, with the head on that side, cheapest at some price."""
        n, change = self.problem.n_layer, self.objective.hand_over / 2
        at = np.flatnonzero(np.isfinite(self._costs[n][:, :, n_dense].min(axis=1)))
        side, left = np.full(len(at), int(head)), np.full(len(at), n_dense)
        dense = np.zeros((len(at), n), bool)
        for i in range(n, 0, -1):
            stay, move = self._costs[i][at, side, left], self._costs[i][at, 1 - side, left] + change
            side = np.where(stay <= move, side, 1 - side)
            dense[:, i - 1] = side == 1
            left = left - side
        return np.unique(dense, axis=0)


def _around_chain(order: Ints) -> Bools:
    """[pattern, step]: which steps are done, after none, the first, the first two, ... of `order`, and around each of
    these places with one near step more or less."""
    n = len(order)
    place, chain = np.arange(n + 1), np.tri(n + 1, n, -1, dtype=bool)
    found = [chain]
    for away in range(-WINDOW, WINDOW):
        step = place + away
        near = chain[(step >= 0) & (step < n)]
        near[np.arange(len(near)), step[(step >= 0) & (step < n)]] ^= True
        found.append(near)
    done = np.zeros((sum(map(len, found)), n), bool)
    done[:, order] = np.concatenate(found)
    return done
