"""`place`: the best plan found within the budgets, with a bound that proves how good it is."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from powerinfer_tools.artifact.layout import MODE_PREDICTOR, LayerPlan
from powerinfer_tools.checkpoint.config import Config
from powerinfer_tools.errors import Infeasible, PowerinferError
from powerinfer_tools.placement.costs import artifact_costs
from powerinfer_tools.placement.machine import Machine
from powerinfer_tools.placement.objective import Objective, misses, time
from powerinfer_tools.placement.problem import Budgets, Firing, Plan, Problem
from powerinfer_tools.placement.search import Search, fastest_in_ram, smallest_ram

OBJECTIVES = ("time", "impact")


@dataclass(frozen=True)
class Placement:
    """Prefixes of every layer and what they give.

    vram, ram: k1 and k2 of each layer; dense, head: blocks in vram; expected_ms: of a token; impact: the paper's
    objective; bound: no plan is better in `objective` (ms, or impact); gap: distance to it, relative to it; n_bytes: by
    tier, with KV cache and scratch; hits: share of firings served by each tier, over all layers; inputs: digests of
    what it was made from.
    """

    vram: list[int]
    ram: list[int]
    dense: list[bool]
    head: bool
    n_ff: int
    objective: str
    quant: str
    ctx_size: int
    expected_ms: float
    impact: float
    bound: float
    gap: float
    budgets: dict[str, int | None]
    n_bytes: dict[str, int]
    hits: dict[str, float]
    inputs: dict[str, str]
    layers: list[dict[str, Any]] = field(default_factory=list)

    @property
    def n_layer(self) -> int:
        return len(self.vram)


def place(
    config: Config,
    activations: Firing,
    plans: Sequence[LayerPlan],
    *,
    quant: str,
    biases: frozenset[str],
    ctx_size: int,
    machine: Machine,
    vram: int = 0,
    ram: int | None = None,
    objective: str = "time",
    let_through: Sequence[float] | None = None,
    head: str | None = None,
    inputs: dict[str, str] | None = None,
) -> Placement:
    """The best placement of an artifact on a machine; with more vram or ram it is never worse in its objective.

    vram, ram: budgets in bytes; ram None: what the machine has. let_through: neurons let through per firing one, a
    layer. head: the type of output.weight, where it is not `quant`. inputs: digests to record beside those of
    activations and machine. Errors: a budget that cannot do names the smallest that would; vram on a machine without a
    card.
    """
    if objective not in OBJECTIVES:
        raise PowerinferError(f"--objective: expected {' or '.join(OBJECTIVES)}, found {objective!r}", "usage")
    if (activations.n_layer, activations.n_ff) != (config.n_layer, config.n_ff):
        found = f"{activations.n_layer} layers of {activations.n_ff} neurons"
        raise PowerinferError(
            f"activations: expected {config.n_layer} layers of {config.n_ff}, found {found}", "mismatch"
        )
    how: dict[str, Any] = {
        "ctx_size": ctx_size,
        "threads": machine.threads,
        "card_context": machine.vram.context if machine.vram else 0,
    }
    costs = artifact_costs(config, plans, quant=quant, head=head, biases=biases, **how)
    ratio = None if let_through is None else np.asarray(let_through, np.float64)
    problem = Problem(costs, activations, machine, ratio)
    limits = _limits(problem, vram, ram)
    plan, bound = _best(problem, limits, objective)
    digests = {"activations": activations.digest, "machine": machine.digest, **(inputs or {})}
    return _describe(problem, plan, bound, limits, objective, quant, ctx_size, digests)


def let_through(plans: Sequence[LayerPlan], figures: Sequence[dict[str, Any]]) -> list[float]:
    """Neurons that each layer's predictor lets through for one that fires, as training measured it; else 1."""
    return [
        figure["predicted"] / figure["active"] if plan.mode == MODE_PREDICTOR and figure.get("active", 0) > 0 else 1.0
        for plan, figure in zip(plans, figures, strict=True)
    ]


def _limits(problem: Problem, vram: int, ram: int | None) -> dict[str, int | None]:
    """Bytes of vram and ram; ram None: no limit."""
    if vram < 0 or (ram is not None and ram < 0):
        raise PowerinferError(f"expected budgets of at least 0 bytes, found vram {vram}, ram {ram}", "usage")
    check_vram(problem, vram)
    return {"vram": vram, "ram": ram if ram is not None else problem.machine.ram.n_bytes or None}


def check_vram(problem: Problem, vram: int) -> None:
    """Errors: no card, or more than it has."""
    if vram and problem.vram.n_bytes and vram > problem.vram.n_bytes:
        raise PowerinferError(
            f"--vram: expected at most the card's {problem.vram.n_bytes} bytes, found {vram}", "usage"
        )


def _best(problem: Problem, limits: dict[str, int | None], objective: str) -> tuple[Plan, float]:
    """(plan, bound in the objective's unit)."""
    needed = problem.costs.needed  # more ram than that is never used
    budgets = Budgets(limits["vram"] or 0, needed if limits["ram"] is None else min(limits["ram"], needed))
    cost = time(problem) if objective == "time" else misses(problem)
    found = Search(problem, cost, budgets).best()
    if found.plan is None:
        raise infeasible(problem, cost, budgets)
    if objective == "time":
        return found.plan, found.bound * 1e3
    return fastest_in_ram(problem, found.plan, budgets), problem.impact(found.plan) + found.cost - found.bound


def infeasible(problem: Problem, objective: Objective, budgets: Budgets, apart: int = 0) -> Infeasible:
    """What says that no plan fits, and which ram would do; apart: bytes of ram that are not in the budget."""
    least = max(smallest_ram(problem, objective, budgets.vram), budgets.ram + 1) + apart  # chunks may need more
    beside = f" beside --vram {budgets.vram}" if budgets.vram else ""
    return Infeasible(
        f"--ram: expected at least {least} bytes ({least / 2**20:.1f} MiB){beside}, found {budgets.ram + apart}: "
        "attention, KV cache, scratch and what chooses neurons cannot stay on disk",
        least,
    )


def _describe(
    problem: Problem,
    plan: Plan,
    bound: float,
    limits: dict[str, int | None],
    objective: str,
    quant: str,
    ctx_size: int,
    inputs: dict[str, str],
) -> Placement:
    expected_ms, impact = float(problem.seconds(plan)) * 1e3, float(problem.impact(plan))
    value = impact if objective == "impact" else expected_ms
    each = problem.each
    served = np.stack([problem.fired[each, plan.vram], problem.fired[each, plan.ram], problem.fired[each, -1]])
    shares = np.diff(served, axis=0, prepend=0.0)  # [tier, layer]
    total = float(served[-1].sum())
    ms = problem.layer_seconds(each, plan.dense, plan.vram, plan.ram) * 1e3
    tiers = ("vram", "ram", "disk")
    return Placement(
        vram=plan.vram.tolist(),
        ram=plan.ram.tolist(),
        dense=plan.dense.tolist(),
        head=plan.head,
        n_ff=problem.n_ff,
        objective=objective,
        quant=quant,
        ctx_size=ctx_size,
        expected_ms=expected_ms,
        impact=impact,
        bound=float(bound),
        gap=abs(value - float(bound)) / max(float(bound), 1e-12),
        budgets=limits,
        n_bytes={tier: int(size) for tier, size in zip(tiers, problem.bytes(plan), strict=True)},
        hits={tier: float(shares[t].sum() / total) if total else 0.0 for t, tier in enumerate(tiers)},
        inputs=inputs,
        layers=[
            {
                "layer": i,
                "fires": float(served[-1, i]),
                "hits": {tier: float(shares[t, i] / max(served[-1, i], 1e-300)) for t, tier in enumerate(tiers)},
                "ms": float(ms[i]),
            }
            for i in range(problem.n_layer)
        ],
    )
