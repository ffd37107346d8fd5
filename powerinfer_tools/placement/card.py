"""What goes to a card when an artifact is loaded: the search of `place`, with neurons divided where the engine can."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from powerinfer_tools.artifact.layout import LayerPlan
from powerinfer_tools.artifact.read import Artifact
from powerinfer_tools.checkpoint.config import Config
from powerinfer_tools.engine.engine import CardLimits
from powerinfer_tools.engine.generate import CARD_PIECE
from powerinfer_tools.engine.native import chunk_bounds
from powerinfer_tools.errors import Infeasible, PowerinferError
from powerinfer_tools.placement.costs import artifact_costs, visit_bytes
from powerinfer_tools.placement.hottest import hottest_first
from powerinfer_tools.placement.machine import Machine
from powerinfer_tools.placement.measure import cached_machine, device
from powerinfer_tools.placement.objective import time
from powerinfer_tools.placement.place import check_vram, infeasible, let_through
from powerinfer_tools.placement.problem import Budgets, Firing, Floats, Ints, Plan, Problem
from powerinfer_tools.placement.search import Search, fastest_in_ram

VISIT_SHARE = 0.1  # of what weights may take of a card, for neurons that are lent

# That a thread adds in a second, in prompts. Of 8 bits: LLaMA-2-7B's shape in q4_0, 2 threads, 88 tokens/s
# (benchmarks/LOG.md); others: a third of it, a guess.
PRODUCTS = {"q4_0": 3e11, "q8_0": 3e11}
OTHER_PRODUCTS = 1e11


class StoredFiring:
    """The firing frequencies that an artifact carries, as placement asks for them; dense: all neurons are computed,
    of experts those of the chosen ones."""

    def __init__(self, artifact: Artifact, dense: bool = False) -> None:
        self.artifact, self.digest, self.dense = artifact, artifact.data_sha256, dense
        self.n_layer, self.n_ff = artifact.config.n_layer, artifact.config.n_ff

    def frequency(self, i: int, /) -> npt.NDArray[np.float64]:
        if self.dense:
            return np.full(self.n_ff, self.artifact.config.taking_part)
        return self.artifact.frequency(i).astype(np.float64)


@dataclass(frozen=True)
class CardPlan:
    """What goes to a card within `vram` bytes: at most n_bytes, everything counted."""

    vram: int
    n_bytes: int
    plan: Plan
    problem: Problem
    limits: CardLimits


def plan_card(
    artifact: Artifact,
    vram: int,
    ram: int | None,
    apart: int = 0,
    *,
    ctx_size: int,
    threads: int,
    contexts: int = 1,
    dense: bool = False,
    machine: Machine | None = None,
    say: Callable[[str], None] | None = None,
) -> CardPlan | None:
    """What goes to the card; None, said, where nothing is faster there.

    ram: bytes of memory, None: as many as there need be; apart: what of these is not for weights, KV caches and
    scratch; machine: what to plan for, else this one. Errors: no card; more than it has; no plan.
    """
    here = machine or cached_machine(None, threads, say, card=True, apart=ram is not None)

    def problem_on(machine: Machine) -> Problem:
        how = {"ctx_size": ctx_size, "threads": threads, "contexts": contexts}
        return artifact_problem(artifact, machine, dense=dense, **how)

    problem = problem_on(here)
    room = problem.costs.needed if ram is None else min(problem.costs.needed, ram - apart)
    if room < problem.costs.needed and (machine is None or machine.disk is None):
        kept = cached_machine(artifact.path, threads, say, apart=True)
        problem = problem_on(replace(here, disk=kept.disk))
    check_vram(problem, vram)
    plan = best_plan(problem, Budgets(vram, room), apart)
    lend_from = lending(artifact, here, (vram - problem.costs.card_fixed) // contexts, threads)
    plan, visit = _with_visits(problem, plan, Budgets(vram, room), artifact) if lend_from else (plan, 0)
    if n_bytes := int(problem.bytes(plan)[0]):
        limits = card_limits(plan, vram, device(), lend_from if visit else 0)
        return CardPlan(vram, n_bytes + visit, plan, problem, limits)
    if say is not None:
        say(f"--vram: nothing is faster on the card within {vram} bytes, {problem.costs.card_fixed} of them its own")
    return None


def check_structure(config: Config) -> None:
    """Errors: what the engine runs without a card (native/src/model_device.cpp)."""
    if config.sub_norms:
        text = "--vram: a model with norms of its neurons' sums runs on the processor alone so far"
        raise PowerinferError(text, "unsupported")


def lending(artifact: Artifact, machine: Machine, vram: int, threads: int) -> int:
    """Tokens of a prompt from which a neuron is copied to the card in less time than the processor computes it; 0:
    never, or the room for a layer's neurons is too large a share of these bytes of vram."""
    config, copy = artifact.config, machine.vram.copy if machine.vram is not None else 0.0
    room = visit_bytes(config, artifact.quant)
    if copy <= 0 or room > VISIT_SHARE * vram or config.experts is not None:
        return 0
    products = config.n_ff * config.n_rows * config.n_embd
    speed = threads * PRODUCTS.get(artifact.quant, OTHER_PRODUCTS)
    tokens = int(np.ceil(room / copy * speed / products))
    return tokens if tokens <= CARD_PIECE else 0


def _with_visits(problem: Problem, plan: Plan, budgets: Budgets, artifact: Artifact) -> tuple[Plan, int]:
    """The plan, another where it leaves too little room for the neurons of a layer that visit, and their bytes.

    0 bytes: no neuron is left to visit, or nothing goes to the card beside them.
    """

    def room(plan: Plan) -> int:
        lent = int(np.max(problem.n_ff - plan.vram))
        return problem.costs.contexts * visit_bytes(artifact.config, artifact.quant, lent) if lent else 0

    visit = room(plan)
    if problem.bytes(plan)[0] + visit <= budgets.vram:
        return plan, visit
    whole = problem.costs.contexts * visit_bytes(artifact.config, artifact.quant)
    try:
        less = best_plan(problem, replace(budgets, vram=budgets.vram - whole))
    except Infeasible:  # memory is short: nothing is spared for visits
        return plan, 0
    return (less, room(less)) if problem.bytes(less)[0] else (plan, 0)


def artifact_problem(
    artifact: Artifact,
    machine: Machine,
    *,
    ctx_size: int,
    threads: int | None = None,
    contexts: int = 1,
    dense: bool = False,
) -> Problem:
    """What judges a plan of an artifact on this machine, run with so many threads (else the machine's) and contexts.

    dense: all neurons are computed, and read in sequence.
    """
    return card_problem(
        artifact.config,
        artifact.plans,
        StoredFiring(artifact, dense),
        machine.in_sequence if dense else machine,
        divided_by=StoredFiring(artifact),
        quant=artifact.quant,
        head=artifact.head,
        biases=artifact.biases,
        ctx_size=ctx_size,
        threads=threads or machine.threads,
        contexts=contexts,
        let_through=_let_through(artifact),
    )


def card_problem(
    config: Config,
    plans: Sequence[LayerPlan],
    firing: Firing,
    machine: Machine,
    *,
    quant: str,
    lends: bool = False,
    divided_by: Firing | None = None,
    let_through: Sequence[float] | None = None,
    **how: Any,
) -> Problem:
    """The problem whose k1 are bounds of the engine's chunks; how: as artifact_costs takes it.

    lends: a layer's neurons may visit the card; divided_by: the frequencies that the artifact carries, where these are
    not what is expected to fire.
    """
    context = machine.vram.context if machine.vram is not None else 0
    stand_in = machine.vram is not None and device() == "host"
    costs = artifact_costs(config, plans, quant=quant, card_context=context, stand_in=stand_in, **how)
    ratio = None if let_through is None else np.asarray(let_through, np.float64)
    stored = divided_by or firing
    bounds = None
    if config.experts is None:
        bounds = [chunk_bounds(stored.frequency(i).astype(np.float32)) for i in range(config.n_layer)]
    problem = Problem(costs, firing, machine, ratio, bounds)
    if lends:
        problem.reserve(problem.costs.contexts * visit_bytes(config, quant))
    return problem


def _let_through(artifact: Artifact) -> list[float] | None:
    """What training measured of the predictors, where the artifact says it as `split` writes it."""
    figures = artifact.provenance.get("predictors")
    try:
        return let_through(artifact.plans, figures) if figures else None
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def best_plan(problem: Problem, budgets: Budgets, apart: int = 0) -> Plan:
    """The fastest plan that is found within the budgets, never slower than hottest_first or than no card is.

    apart: bytes of ram beside. Errors: there is none.
    """
    objective = time(problem)
    found = Search(problem, objective, budgets).best(quick=True)
    if found.plan is None:
        raise infeasible(problem, objective, budgets, apart)
    starts = [found.plan, Plan.in_ram(problem.n_layer, problem.n_ff), hottest_first(problem, budgets.vram)]
    plans = [at_bounds(problem, plan, budgets) for plan in starts]  # chunks may be too large for the first
    if not (fitting := [plan for plan in plans if problem.fits(plan, budgets)]):
        raise infeasible(problem, objective, budgets, apart)
    return min(fitting, key=problem.seconds)


def at_bounds(problem: Problem, plan: Plan, budgets: Budgets) -> Plan:
    """The plan with each k1 lowered to a bound, and with what is then left of vram spent where a byte saves most."""
    spent = _Spending(problem, plan, budgets.vram).spent()
    in_ram = replace(spent, ram=np.full(problem.n_layer, problem.n_ff))
    return in_ram if problem.fits(in_ram, budgets) else fastest_in_ram(problem, spent, budgets)


def card_limits(plan: Plan, vram: int, device: str, lend_from: int = 0) -> CardLimits:
    """The plan as the engine takes it."""
    dense, neurons = (tuple(values.tolist()) for values in (plan.dense, plan.vram))
    return CardLimits(dense, neurons, bool(plan.head), vram, lend_from, device)


class _Spending:
    """A plan on the way to the end of its budget, as a place of each layer among its bounds."""

    def __init__(self, problem: Problem, plan: Plan, vram: int) -> None:
        self.problem, self.ram = problem, plan.ram
        self.each, self.k = problem.each, problem.bounds
        self.at = np.count_nonzero(self.k[:, 1:] <= plan.vram[:, None], axis=1)
        self.last = np.argmax(self.k, axis=1)
        self.at = np.minimum(self.at, self.last)
        self.dense, self.head = plan.dense.astype(np.int64), int(plan.head)
        k2 = np.maximum(self.k, plan.ram[:, None])
        sides = (np.full(self.k.shape, side) for side in (False, True))
        self.seconds = np.stack([problem.layer_seconds(self.each[:, None], side, self.k, k2) for side in sides])
        self.bytes = problem.card_bytes(self.each[:, None], self.k)
        used = int(problem.bytes(self.plan())[0])
        self.room = vram - (used or problem.costs.card_fixed)

    def plan(self) -> Plan:
        vram = self.k[self.each, self.at]
        return Plan(self.dense.astype(bool), bool(self.head), vram, np.maximum(self.ram, vram))

    def spent(self) -> Plan:
        """The plan when nothing that fits saves time."""
        while (step := self._best_step()) is not None:
            layer, dense, at, n_bytes = step
            self.room -= n_bytes
            if layer < 0:
                self.head = 1
            else:
                self.dense[layer], self.at[layer] = dense, at
        return self.plan()

    def _best_step(self) -> tuple[int, int, int, int] | None:
        """(layer or -1 for the head, its side, its place, bytes): what saves most for a byte; None: nothing does."""
        following, block = np.minimum(self.at + 1, self.last), np.ones_like(self.dense)
        choices = [(self.dense, following), (self.dense, self.last), (block, self.at), (block, following)]
        choices.append((block, self.last))
        sides, places = (np.stack(values) for values in zip(*choices, strict=True))  # [choice, layer]
        saved, n_bytes = self._saved(sides, places), self._bytes(sides, places)
        saved, n_bytes = np.append(saved, self._head_saves()), np.append(n_bytes, self.problem.costs.card_head)
        fits = (n_bytes > 0) & (n_bytes <= self.room) & (saved > 0)
        worth = np.where(fits, saved / np.maximum(n_bytes, 1), 0.0)
        best = int(np.argmax(worth))
        if worth[best] <= 0:
            return None
        if best == sides.size:
            return -1, 1, 0, int(n_bytes[best])
        choice, layer = divmod(best, len(self.each))
        return layer, int(sides[choice, layer]), int(places[choice, layer]), int(n_bytes[best])

    def _saved(self, sides: Ints, places: Ints) -> Floats:
        ends = np.concatenate([[0], self.dense, [self.head]])
        crossings = (sides - self.dense) * (2 - 2 * (ends[:-2] + ends[2:]))
        before = self.seconds[self.dense, self.each, self.at]
        after = self.seconds[sides, self.each, places] + crossings * self.problem.hand_over_s / 2
        return np.asarray(before - after)

    def _bytes(self, sides: Ints, places: Ints) -> Ints:
        moved = self.bytes[self.each, places] - self.bytes[self.each, self.at]
        return np.asarray(moved + (sides - self.dense) * self.problem.card_block)

    def _head_saves(self) -> float:
        if self.head:
            return 0.0
        in_ram, in_vram = self.problem.head_seconds
        return float(in_ram - in_vram - (1 - self.dense[-1]) * self.problem.hand_over_s)
