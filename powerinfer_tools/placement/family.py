"""The patterns that are tried, whatever the budgets.

As the price of vram falls, a layer's neurons go from NONE to SOME to ALL in vram, each step at a price of its own; the
steps of all layers, by that price, make a chain of patterns. As the price of ram falls, layers leave the disk one after
the other. Tried are the places of these chains and, around each place, one step more or less: that reaches what no
price does.
"""

import numpy as np

from powerinfer_tools.placement.fill import Fill
from powerinfer_tools.placement.problem import ALL, NONE, SOME, Bools, Floats, Ints

WINDOW = 2  # steps before and after a place of a chain that are undone and done


class Family:
    """The patterns of one problem: what is in vram, by cell (head, number of dense blocks there), and on disk."""

    def __init__(self, fill: Fill) -> None:
        self.fill, self.problem, self.objective = fill, fill.problem, fill.objective
        p, o, k = self.problem, self.objective, fill.k
        each = p.each[:, None]
        self.stored = p.card_bytes(each, k)
        curves = (o.ram, o.disk) if p.machine.disk else (o.ram,)
        self.shares = [  # [layer, knot]: all else is in ram, or on disk
            np.maximum(o.card(each, k), curve(each, k[:, -1:]) - curve(each, k)) for curve in curves
        ]
        self.steps = [[self._vram_steps(share, dense) for dense in (False, True)] for share in self.shares]
        self.disks = self._disks()

    def cell(self, n_dense: int) -> tuple[Bools, Ints]:
        """What is in vram in a cell's patterns: (dense, card), each [n, n_layer]."""
        dense = self._blocks(n_dense)
        cards = [self._cards(blocks) for blocks in dense]
        return np.repeat(dense, [len(card) for card in cards], axis=0), np.concatenate(cards)

    def _blocks(self, n_dense: int) -> Bools:
        """[n, n_layer]: so many dense blocks in vram: the first, the last, those that gain most for a byte."""
        p, blocks = self.problem, self.objective.blocks
        by_gain = np.argsort((blocks[1] - blocks[0]) / p.card_block, kind="stable")
        orders = np.stack([p.each, p.each[::-1], by_gain])
        dense = np.zeros(orders.shape, bool)
        np.put_along_axis(dense, orders[:, :n_dense], True, axis=1)
        return np.asarray(np.unique(dense, axis=0))

    def _cards(self, dense: Bools) -> Ints:
        n = self.problem.n_layer
        found = [np.full((1, n), SOME)]
        for by_side in self.steps:
            prices = np.where(dense[:, None], by_side[1], by_side[0]).ravel()  # two steps a layer
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
        if self.objective.disk is self.objective.ram:  # nothing is gained by one layer's bundles rather than another's
            return np.array([[False] * n, [True] * n])
        starts = np.zeros(n, np.int64), self.fill.caps
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
