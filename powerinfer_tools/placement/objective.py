"""What a plan costs: the expected time of a token, or the impact that vram misses. Both have one form.

With k1 of a layer's neurons in vram, k2 - k1 in ram and the rest on disk

    layer = dense block + max(card(k1), ram(k2) - ram(k1) + disk(n_ff) - disk(k2))
          + hand-over   where both processors take part in the layer
          + latency     where some of its neurons are on disk
    plan  = sum of layers + output head + half a hand-over wherever the hidden state changes sides.

No curve falls, and disk - ram rises with every neuron.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from powerinfer_tools.placement.problem import Floats, Index, Ints, Plan, Problem

Curve = Callable[[Index, Index], Any]  # of stored neurons [0, k) of layer i


@dataclass(frozen=True)
class Objective:
    """The terms of a cost.

    blocks, head: in ram and in vram, blocks [2, n_layer]; least: fewest neurons of a layer worth being in vram,
    n_ff + 1: never any.
    """

    cost: Callable[[Plan], Any]
    card: Curve
    ram: Curve
    disk: Curve
    hand_over: float
    latency: float
    blocks: Floats
    head: tuple[float, float]
    least: Ints

    def all_in_ram(self, problem: Problem) -> float:
        """The cost with nothing in vram nor on disk."""
        return float(self.cost(Plan.in_ram(problem.n_layer, problem.n_ff)))

    def short(self, i: int, places: Ints) -> tuple[float, float]:
        """The most that straight lines between some places fall short of layer i's curves `ram` and `disk - ram`."""
        k = np.arange(places[-1] + 1)
        ram, disk = self.ram(i, k), self.disk(i, k)
        return _shortfall(ram, places), _shortfall(disk - ram, places)


def time(problem: Problem) -> Objective:
    """Seconds of a token."""
    p, machine = problem, problem.machine
    vram = machine.vram or machine.ram
    in_vram = p.dense_seconds(vram) if machine.vram else np.full(p.n_layer, np.inf)

    def ram(i: Index, k: Index) -> Any:
        return p.tier_seconds(machine.ram, i, k)

    return Objective(
        cost=p.seconds,
        card=lambda i, k: p.tier_seconds(vram, i, k),
        ram=ram,
        disk=p.disk_seconds if machine.disk else ram,
        hand_over=p.hand_over_s,
        latency=machine.disk.latency_s if machine.disk else 0.0,
        blocks=np.stack([p.dense_seconds(machine.ram), in_vram]),
        head=p.head_seconds,
        least=p.fewest,
    )


def misses(problem: Problem) -> Objective:
    """The paper's impact (PowerInfer, section 6, equations 1-8) that is not in vram: at least C_l neurons of a layer
    are in vram or none."""
    p = problem

    def fired(i: Index, k: Index) -> Any:
        return p.fired[i, k]

    most = p.fired[:, -1].sum() + p.block_impact.sum() + p.head_impact
    return Objective(
        cost=lambda plan: most - p.impact(plan),
        card=lambda i, k: np.zeros(np.broadcast(i, k).shape),
        ram=fired,
        disk=fired,
        hand_over=0.0,
        latency=0.0,
        blocks=np.stack([p.block_impact, np.zeros(p.n_layer)]),
        head=(p.head_impact, 0.0),
        least=np.maximum(p.least(), p.fewest) if p.machine.vram else p.fewest,
    )


def _shortfall(curve: Floats, places: Ints) -> float:
    straight = np.interp(np.arange(len(curve)), places, curve[places])
    return max(0.0, float(np.max(curve - straight)))
