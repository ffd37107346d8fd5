"""`place`: the program's plan, its last neurons spent, checked against greedy, with its bound and gap."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from powerinfer_tools.artifact.layout import MODE_PREDICTOR, LayerPlan
from powerinfer_tools.checkpoint.config import Config
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.placement.bound import Relaxation
from powerinfer_tools.placement.costs import artifact_costs
from powerinfer_tools.placement.greedy import fill_ram, greedy, refine, trim
from powerinfer_tools.placement.machine import Machine
from powerinfer_tools.placement.problem import Budgets, Firing, Plan, Problem
from powerinfer_tools.placement.program import TIME_LIMIT_S, Program, smallest_ram

OBJECTIVES = ("time", "impact")
ENOUGH = 5e-4  # relative gap at which the program need not branch


@dataclass(frozen=True)
class Placement:
    """Prefixes of every layer and what they give.

    vram, ram: k1 and k2 of each layer; dense, head: blocks in vram; expected_ms: of a token; impact: the paper's
    objective; bound: no plan is better in `objective` (ms, or impact), None where none was proved; gap: distance to it,
    relative to it; status: optimal, stopped (time limit) or greedy (no solver); n_bytes: by tier, with KV cache and
    scratch; hits: share of firings served by each tier, over all layers; inputs: digests of what it was made from.
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
    bound: float | None
    gap: float | None
    status: str
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
    inputs: dict[str, str] | None = None,
    time_limit_s: float = TIME_LIMIT_S,
) -> Placement:
    """The best placement of an artifact on a machine.

    vram, ram: budgets in bytes; ram None: what the machine has. let_through: neurons let through per firing one, a
    layer. inputs: digests to record beside those of activations and machine. Errors: a budget that cannot do names the
    smallest that would; vram on a machine without a card.
    """
    if objective not in OBJECTIVES:
        raise PowerinferError(f"--objective: expected {' or '.join(OBJECTIVES)}, found {objective!r}", "usage")
    if (activations.n_layer, activations.n_ff) != (config.n_layer, config.n_ff):
        found = f"{activations.n_layer} layers of {activations.n_ff} neurons"
        raise PowerinferError(
            f"activations: expected {config.n_layer} layers of {config.n_ff}, found {found}", "mismatch"
        )
    costs = artifact_costs(config, plans, quant=quant, biases=biases, ctx_size=ctx_size, threads=machine.threads)
    ratio = None if let_through is None else np.asarray(let_through, np.float64)
    problem = Problem(costs, activations, machine, ratio)
    budgets = _budgets(problem, vram, ram)
    plan, bound, status = _best(problem, budgets, objective, time_limit_s)
    digests = {"activations": activations.digest, "machine": machine.digest, **(inputs or {})}
    return _describe(problem, plan, budgets, objective, bound, status, quant, ctx_size, digests)


def let_through(plans: Sequence[LayerPlan], figures: Sequence[dict[str, Any]]) -> list[float]:
    """Neurons that each layer's predictor lets through for one that fires, from what training measured."""
    return [
        figure["predicted"] / figure["active"] if plan.mode == MODE_PREDICTOR and figure["active"] > 0 else 1.0
        for plan, figure in zip(plans, figures, strict=True)
    ]


def _budgets(problem: Problem, vram: int, ram: int | None) -> Budgets:
    if vram < 0 or (ram is not None and ram < 0):
        raise PowerinferError(f"expected budgets of at least 0 bytes, found vram {vram}, ram {ram}", "usage")
    if vram and problem.vram.n_bytes and vram > problem.vram.n_bytes:
        raise PowerinferError(
            f"--vram: expected at most the card's {problem.vram.n_bytes} bytes, found {vram}", "usage"
        )
    return Budgets(vram, ram if ram is not None else problem.machine.ram.n_bytes or None)


def _best(problem: Problem, budgets: Budgets, objective: str, time_limit_s: float) -> tuple[Plan, float | None, str]:
    """(plan, bound, status): the best of the program's plan and the greedy one."""
    program = Program(problem, budgets, objective)
    plans = [greedy(problem, budgets, objective)]
    bound, status = None, "greedy"
    if objective == "time" and not program.exact and (prices := program.relax()) is not None:
        seconds, near = Relaxation(problem, budgets).search(prices)
        plans, bound, status = [*plans, near], seconds * 1e3, "optimal"
    finished = [_finished(problem, plan, budgets, objective) for plan in plans]
    if not _proven(problem, finished, bound):
        found, plan = program.branch(time_limit_s)
        finished.append(_finished(problem, plan, budgets, objective))
        status = status if plan is None else found
        if found == "optimal":
            bound = program.bound() if bound is None else max(bound, program.bound())
    fitting = [plan for plan in finished if plan is not None]
    if not fitting:
        raise _infeasible(problem, budgets)
    return max(fitting, key=problem.impact if objective == "impact" else problem.speed), bound, status


def _finished(problem: Problem, plan: Plan | None, budgets: Budgets, objective: str) -> Plan | None:
    """The plan brought within the budgets and these spent to the last neuron, or None where it cannot fit."""
    if plan is None:
        return None
    plan = fill_ram(problem, plan, budgets) if objective == "impact" else trim(problem, plan, budgets)
    return refine(problem, plan, budgets, objective) if problem.fits(plan, budgets) else None


def _proven(problem: Problem, plans: list[Plan | None], bound_ms: float | None) -> bool:
    """One of the plans is within ENOUGH of the bound."""
    if bound_ms is None:
        return False
    return any(plan is not None and problem.seconds(plan) * 1e3 <= bound_ms * (1 + ENOUGH) for plan in plans)


def _infeasible(problem: Problem, budgets: Budgets) -> PowerinferError:
    least = smallest_ram(problem, budgets.vram)
    beside = f" beside --vram {budgets.vram}" if budgets.vram else ""
    return PowerinferError(
        f"--ram: expected at least {least} bytes ({least / 2**20:.1f} MiB){beside}, found {budgets.ram}: "
        "attention, KV cache, scratch and what chooses neurons cannot stay on disk",
        "infeasible",
    )


def _describe(
    problem: Problem,
    plan: Plan,
    budgets: Budgets,
    objective: str,
    bound: float | None,
    status: str,
    quant: str,
    ctx_size: int,
    inputs: dict[str, str],
) -> Placement:
    expected_ms, impact = problem.seconds(plan) * 1e3, problem.impact(plan)
    value = impact if objective == "impact" else expected_ms
    gap = None if bound is None else max(0.0, abs(value - bound) / max(abs(bound), 1e-12))
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
        bound=bound,
        gap=gap,
        status=status,
        budgets={"vram": budgets.vram, "ram": budgets.ram},
        n_bytes=dict(zip(tiers, problem.bytes(plan), strict=True)),
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
