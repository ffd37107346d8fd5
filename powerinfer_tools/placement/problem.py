"""A placement as numbers, what it weighs in every tier and how long a token takes with it.

Time (design: each device computes its whole share, one merge a layer). With k1 neurons in vram and k2 - k1 in ram

    layer = dense block + KV   at the sequential bandwidth of the block's tier, the context half full
          + router             at that of ram, of models with experts
          + max(vram share, ram share + disk share)
          + hand-over          where both processors take part in the layer
          + disk latency       where some of its neurons are on disk
    token = sum of layers + output head + half a hand-over wherever the hidden state changes sides.

What is read for every token (beside the bundles) moves at the sequential bandwidth, picked rows at that of their size.
In vram each step of a block, of a layer's neurons and of the head takes a launch, and the logits are copied back.

A hand-over: the FFN's input to the other side and a sum back. Where the block is in ram the processor computes its
share meanwhile, so that less of it is seen: the time is then an upper bound, by a hand-over a layer at most. So it is
where a layer's own input chooses experts: it crosses, half a hand-over, though it need not behind a block in ram.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.placement.costs import Costs
from powerinfer_tools.placement.machine import Machine, Tier

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Index = Any  # an int or an array of ints
Bools = npt.NDArray[np.bool_]
NONE, SOME, ALL = range(3)  # of a layer's neurons are in vram

# small steps of the card (native/cuda), one behind another
BLOCK_STEPS, PREDICTOR_STEPS, FFN_STEPS, HEAD_STEPS = 7, 2, 3, 2


class Firing(Protocol):
    """What placement asks of activations: powerinfer_tools.activations.Activations has it."""

    @property
    def n_layer(self) -> int: ...
    @property
    def n_ff(self) -> int: ...
    @property
    def digest(self) -> str: ...
    def frequency(self, i: int, /) -> npt.NDArray[np.float64]: ...


@dataclass(frozen=True)
class Plan:
    """dense[i]: layer i's dense block is in vram; head: the output head is; vram, ram: k1 and k2 of each layer.

    Many plans have an axis in front, head too.
    """

    dense: Bools
    head: Any
    vram: Ints
    ram: Ints

    @staticmethod
    def in_ram(n_layer: int, n_ff: int) -> "Plan":
        """Nothing in vram nor on disk."""
        none = np.zeros(n_layer, np.int64)
        return Plan(none > 0, False, none, none + n_ff)

    def at(self, number: int) -> "Plan":
        """One of many plans."""
        return Plan(self.dense[number], bool(self.head[number]), self.vram[number], self.ram[number])


@dataclass(frozen=True)
class Budgets:
    """Bytes of vram and ram."""

    vram: int
    ram: int


class Problem:
    """Costs, firing frequencies and a machine: everything that judges a plan."""

    def __init__(
        self,
        costs: Costs,
        firing: Firing,
        machine: Machine,
        let_through: Floats | None = None,
        bounds: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """let_through: neurons that each layer's predictor lets through per firing one (at least 1, the default).

        bounds: what k1 of each layer may be, from 0 to n_ff; any number where there are none. Of experts it is 0.
        """
        self.costs, self.machine = costs, machine
        self.n_layer, self.n_ff = firing.n_layer, firing.n_ff
        self.fired = _cumulative(firing)
        self.ratio = np.ones(self.n_layer) if let_through is None else np.maximum(let_through, 1.0)
        layers = costs.layers
        self.dense = np.array([layer.dense for layer in layers], np.int64)
        self.kv = np.array([layer.kv for layer in layers], np.int64)
        self.block = self.dense + costs.contexts * self.kv
        self.card_block = np.array([x.on_card.dense + costs.contexts * x.on_card.kv for x in layers], np.int64)
        self.card_neuron = np.array([layer.on_card.bundle + layer.on_card.beside for layer in layers], np.int64)
        self.card_predictor = np.array([layer.on_card.predictor for layer in layers], np.int64)
        self.bundle = np.array([layer.bundle for layer in layers], np.int64)
        self.first = np.array([layer.first for layer in layers], np.int64)
        self.beside = np.array([layer.beside for layer in layers], np.int64)
        self.predictor = np.array([layer.predictor for layer in layers], np.int64)
        self.always = np.array([layer.always for layer in layers], np.int64)
        self.each = np.arange(self.n_layer)
        self.router = np.array([layer.router for layer in layers], np.int64)
        self.divisible = bounds is None
        self.bounds = _padded(bounds or [(0,) if layer.router else (0, self.n_ff) for layer in layers])
        tiers = [tier for tier in (machine.vram, machine.ram, machine.disk) if tier is not None]
        self._row_seconds = {tier: self._seconds_of_rows(tier) for tier in tiers}

    def reserve(self, n_bytes: int) -> None:
        """Keeps so many bytes of vram free of weights and KV caches."""
        self.costs = replace(self.costs, card_fixed=self.costs.card_fixed + n_bytes)

    @property
    def fewest(self) -> Ints:
        """The fewest neurons of each layer that can be in vram, if any are; n_ff + 1: never any."""
        if not self.divisible:
            return self.bounds[:, 1]
        return np.where(self.router > 0, self.n_ff + 1, 1)

    # Bytes and reads of stored neurons [0, k) of layer i; i and k broadcast.

    def beside_bytes(self, i: Index, k: Index) -> Any:
        """Bytes beside the bundles."""
        return k * self.beside[i] + np.maximum(0, k - self.always[i]) * self.predictor[i]

    def bundle_bytes(self, i: Index, k: Index) -> Any:
        """Bytes of the bundles."""
        return k * self.bundle[i]

    def stored_bytes(self, i: Index, k: Index) -> Any:
        """Bytes of all that is theirs."""
        return self.bundle_bytes(i, k) + self.beside_bytes(i, k)

    def card_bytes(self, i: Index, k: Index) -> Any:
        """Bytes of all that is theirs, in vram."""
        return k * self.card_neuron[i] + np.maximum(0, k - self.always[i]) * self.card_predictor[i]

    def asked(self, i: Index, k: Index) -> Any:
        """Neurons whose first row (or bundle on disk) is expected to be read for a token."""
        prefix = np.where(self.first[i] > 0, np.minimum(k, self.always[i]), 0)
        share = self.costs.taking_part
        forecast = np.minimum(share * (k - prefix), self.ratio[i] * (self.fired[i, k] - self.fired[i, prefix]))
        return share * prefix + forecast

    def tier_seconds(self, tier: Tier, i: Index, k: Index) -> Any:
        """Expected time of computing from vram or ram."""
        first, rest, _ = self._row_seconds[tier]
        beside = self.costs.taking_part * self.beside_bytes(i, k)
        seconds = beside / tier.sequential + self.asked(i, k) * first[i] + self.fired[i, k] * rest[i]
        return seconds + np.where(np.asarray(k) > 0, FFN_STEPS * tier.launch_s, 0.0)

    def disk_seconds(self, i: Index, k: Index) -> Any:
        """Expected time of computing with the bundles on disk, one read each, and what lies beside them in ram."""
        _, _, whole = self._row_seconds[self.disk]
        beside = self.costs.taking_part * self.beside_bytes(i, k)
        return beside / self.machine.ram.sequential + self.asked(i, k) * whole[i]

    def _seconds_of_rows(self, tier: Tier) -> tuple[Floats, Floats, Floats]:
        """Each layer's time for one picked first row, rest of a bundle, and whole bundle.

        A bundle from disk passes through ram: it takes no less time than there.
        """

        def seconds(tier: Tier, sizes: Ints) -> Floats:
            return np.array([size / tier.row_bandwidth(size) for size in sizes.tolist()])

        first, rest = (seconds(tier, sizes) for sizes in (self.first, self.bundle - self.first))
        least = seconds(self.machine.ram, self.first) + seconds(self.machine.ram, self.bundle - self.first)
        return first, rest, np.maximum(seconds(tier, self.bundle), least)

    # Whole layers and plans.

    @property
    def disk(self) -> Tier:
        """The disk. Errors: the machine has none."""
        if self.machine.disk is None:
            raise PowerinferError(f"the machine {self.machine.name!r} has no disk tier", "infeasible")
        return self.machine.disk

    @property
    def vram(self) -> Tier:
        """The card. Errors: the machine has none."""
        if self.machine.vram is None:
            raise PowerinferError(f"--vram: the machine {self.machine.name!r} has no card", "usage")
        return self.machine.vram

    @property
    def hand_over_s(self) -> float:
        """One merge: the FFN's input to the other processor and a partial sum back."""
        return 2 * self.vram.latency_s if self.machine.vram else 0.0

    @property
    def head_seconds(self) -> tuple[float, float]:
        """Time of the output head in ram and in vram."""
        in_ram = self.costs.head / self.machine.ram.sequential
        if self.machine.vram is None:
            return in_ram, np.inf
        copied = self.costs.logits / self.vram.copy if self.vram.copy else 0.0
        return in_ram, self.costs.head / self.vram.sequential + HEAD_STEPS * self.vram.launch_s + copied

    def dense_seconds(self, tier: Tier) -> Floats:
        """Time of each layer's dense block and KV reads, the context half full, and of choosing experts."""
        read = (self.dense + self.kv / 2) / tier.sequential + self.router / self.machine.ram.sequential
        steps = BLOCK_STEPS + PREDICTOR_STEPS * (self.first > 0)
        early = self.costs.routed_early * tier.latency_s
        return np.asarray(read + steps * tier.launch_s + early)

    def ffn_seconds(self, i: Index, k1: Index, k2: Index) -> tuple[Any, Any]:
        """(vram share, ram and disk share) of layer i."""
        ram = self.machine.ram
        shared = self.tier_seconds(ram, i, k2) - self.tier_seconds(ram, i, k1)
        if np.any(k2 < self.n_ff):
            full = np.full_like(k2, self.n_ff)
            shared = shared + np.where(k2 < self.n_ff, self.disk_seconds(i, full) - self.disk_seconds(i, k2), 0.0)
        card = self.tier_seconds(self.vram, i, k1) if np.any(k1 > 0) else np.zeros_like(shared)
        return card, shared

    def layer_seconds(self, i: Index, dense: Any, k1: Index, k2: Index) -> Any:
        """Time of layer i of a token."""
        card, processor = self.ffn_seconds(i, k1, k2)
        seconds = np.maximum(card, processor) + self.dense_seconds(self.machine.ram)[i]
        if self.machine.vram is not None:
            saved = self.dense_seconds(self.machine.ram)[i] - self.dense_seconds(self.vram)[i]
            both = (dense | (k1 > 0)) & (~dense | (k1 < self.n_ff))
            seconds = seconds - np.where(dense, saved, 0.0) + np.where(both, self.hand_over_s, 0.0)
        latency = self.machine.disk.latency_s if self.machine.disk else 0.0
        return seconds + np.where(k2 < self.n_ff, latency, 0.0)

    def seconds(self, plan: Plan) -> Any:
        """Expected time of a token."""
        head = np.where(plan.head, self.head_seconds[1], self.head_seconds[0])
        ends = np.zeros_like(plan.dense[..., :1])
        sides = np.concatenate([ends, plan.dense, np.asarray(plan.head)[..., None], ends], axis=-1)
        changes = np.count_nonzero(sides[..., 1:] != sides[..., :-1], axis=-1)
        layers = self.layer_seconds(self.each, plan.dense, plan.vram, plan.ram)
        return layers.sum(axis=-1) + head + changes * self.hand_over_s / 2

    def impact(self, plan: Plan) -> Any:
        """The paper's objective: firing frequencies of the neurons in vram, summed (section 6, equations 1 and 2).

        A dense block counts as the neurons that its bytes would hold, each of which would fire for every token.
        """
        neurons = self.fired[self.each, plan.vram]
        return (neurons + self.block_impact * plan.dense).sum(axis=-1) + self.head_impact * plan.head

    @property
    def block_impact(self) -> Floats:
        """Impact of each dense block."""
        value: Floats = self.dense / self.bundle
        return value

    @property
    def head_impact(self) -> float:
        return self.costs.head / float(self.bundle[0])

    def least(self) -> Ints:
        """C_l, the least neurons worth a hand-over: C T_gpu + T_sync <= C T_cpu (equations 4, 5); n_ff + 1: never."""
        size = self.bundle + self.beside
        gain = size / self.machine.ram.sequential - size / self.vram.sequential
        with np.errstate(divide="ignore", invalid="ignore"):
            least = np.where(gain > 0, np.ceil(self.hand_over_s / gain), np.inf)
        return np.minimum(np.maximum(least, 1), self.n_ff + 1).astype(np.int64)

    def bytes(self, plan: Plan) -> tuple[Any, Any, Any]:
        """Bytes in vram, ram and on disk, with KV cache and scratch; in vram with its context and padding, too."""
        costs = self.costs
        beside = self.beside_bytes(self.each, plan.vram)
        neurons = self.card_bytes(self.each, plan.vram)
        card = (self.card_block * plan.dense + neurons).sum(axis=-1) + costs.card_head * plan.head
        card = card + np.where(card > 0, costs.card_fixed, 0)
        left = self.beside_bytes(self.each, np.full(self.n_layer, self.n_ff)) - beside
        left = left + self.block * ~plan.dense + (plan.ram - plan.vram) * self.bundle
        ram = left.sum(axis=-1) + costs.head * np.logical_not(plan.head) + costs.host + costs.scratch
        ram = ram + sum(layer.table for layer in costs.layers)
        return card, ram, ((self.n_ff - plan.ram) * self.bundle).sum(axis=-1)

    def fits(self, plan: Plan, budgets: Budgets) -> Any:
        """Within both budgets, to the byte."""
        card, ram, _ = self.bytes(plan)
        return (card <= budgets.vram) & (ram <= budgets.ram)


def _padded(rows: Sequence[Sequence[int]]) -> Ints:
    """The different numbers of each layer, rising, in rows of equal length: the last is repeated."""
    different = [sorted(set(row)) for row in rows]
    longest = max(map(len, different))
    return np.array([row + row[-1:] * (longest - len(row)) for row in different], np.int64)


def _cumulative(firing: Firing) -> Floats:
    """fired[i, k]: expected number of firing neurons among the stored [0, k) of layer i."""
    fired = np.zeros((firing.n_layer, firing.n_ff + 1))
    for i in range(firing.n_layer):
        frequency = np.asarray(firing.frequency(i), np.float64)
        if frequency.shape != (firing.n_ff,) or not np.all((frequency >= 0) & (frequency <= 1)):
            raise PowerinferError(
                f"layer {i}: expected {firing.n_ff} firing frequencies in 0..1, found others", "malformed"
            )
        np.cumsum(np.sort(frequency)[::-1], out=fired[i, 1:])
    return fired
