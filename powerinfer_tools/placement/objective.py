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

    blocks, head: in ram and in vram, blocks [2, n_layer]; least: fewest neurons of a layer worth being in vram;
    firing: the most that one firing neuron of each layer can cost in ram and on disk.
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
    firing: tuple[Floats, Floats]


def time(problem: Problem) -> Objective:
    """Seconds of a token."""
    p, machine = problem, problem.machine
    nothing, never = np.zeros(p.n_layer), np.full(p.n_layer, np.inf)
    vram = machine.vram or machine.ram
    return Objective(
        cost=p.seconds,
        card=lambda i, k: p.tier_seconds(vram, i, k),
        ram=lambda i, k: p.tier_seconds(machine.ram, i, k),
        disk=p.disk_seconds if machine.disk else lambda i, k: p.tier_seconds(machine.ram, i, k),
        hand_over=p.hand_over_s,
        latency=machine.disk.latency_s if machine.disk else 0.0,
        blocks=np.stack([p.dense_seconds(machine.ram), p.dense_seconds(vram) if machine.vram else never]),
        head=p.head_seconds,
        least=np.ones(p.n_layer, np.int64),
        firing=(p.firing_seconds(machine.ram), p.firing_seconds(machine.disk) if machine.disk else nothing),
    )


def misses(problem: Problem) -> Objective:
    """The paper's impact (PowerInfer, section 6, equations 1-8) that is not in vram: at least C_l neurons of a layer
    are in vram or none."""
    p = problem
    nothing = np.zeros(p.n_layer)
    most = p.fired[:, -1].sum() + p.block_impact.sum() + p.head_impact
    return Objective(
        cost=lambda plan: most - p.impact(plan),
        card=lambda i, k: np.zeros(np.broadcast(i, k).shape),
        ram=lambda i, k: p.fired[i, k],
        disk=lambda i, k: p.fired[i, k],
        hand_over=0.0,
        latency=0.0,
        blocks=np.stack([p.block_impact, nothing]),
        head=(p.head_impact, 0.0),
        least=p.least() if p.machine.vram else np.ones(p.n_layer, np.int64),
        firing=(nothing + 1, nothing),
    )
