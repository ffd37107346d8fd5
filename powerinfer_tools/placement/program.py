"""The placement program: prefixes and blocks that minimise the time of a token, or maximise the paper's impact.

A layer's neurons, in stored order, fall into segments. Variables, for layer i and segment s:

    card[i, s], memory[i, s] in 0..1   share of the segment in vram, in ram; the rest is on disk
    dense[i], head in {0, 1}           the block is in vram
    layer[i]                           the longer of the two processors' shares of the FFN
    both[i], disk[i], change[i]        both processors take part; some neurons are on disk; the hidden state moves

A segment's neurons count with their mean firing frequency, and frequencies fall, so that filling segments in order is
best and needs no binaries. The blocks are much alike, which makes branching on them slow: first the program is solved
relaxed, and its dual values are the prices from which `bound` makes a plan and proves it. Only where that leaves a gap
are the binaries branched on. Tiny programs are exact: a segment is one neuron, whole.

Objective `impact` is the paper's (PowerInfer, section 6, equations 1-8): frequencies in vram summed, with at least C_l
neurons of a layer or none.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from powerinfer_tools.placement.bound import Prices, bend_knots, shortfall
from powerinfer_tools.placement.problem import Budgets, Floats, Ints, Plan, Problem

SEGMENTS = {"time": 16, "impact": 64, "ram": 1}  # a layer, by objective
GROUP = 64  # neurons: the finest segment boundary of a large layer (PowerInfer, section 6.3.2)
EXACT = 256  # neurons of all layers up to which the program is exact
TIME_LIMIT_S = 20.0
LEAST = 1e-2  # price in the program's units: where hand-overs alone decide, the relaxed program sees none
DIGITS = 1e-7  # relative: to which the solver writes its values
GAP = {"time": 2e-4, "impact": 1e-5, "ram": 0.0}  # at which branching stops, relative
SCALE = 1e4  # the program counts in parts of all bytes and of the time from ram, whatever the model's size


def segment_ends(fired: Floats, always: int, n_segments: int) -> Ints:
    """Ends of one layer's segments, and 0: at group boundaries, dense where the curve `fired` [n_ff + 1] bends.

    `always`, where the reads of a neuron change, is an end of its own.
    """
    n_ff = len(fired) - 1
    ends = bend_knots(fired, n_segments, min(GROUP, -(-n_ff // n_segments)))
    return np.union1d(ends, always if 0 < always < n_ff else n_ff)


class Program:
    """One problem as a linear program with few binaries. Objectives: time, impact, or ram (least bytes in ram)."""

    def __init__(self, problem: Problem, budgets: Budgets, objective: str) -> None:
        import pulp

        self.problem, self.budgets, self.objective = problem, budgets, objective
        self.lp = pulp.LpProblem(  # type: ignore[no-untyped-call]
            "placement", pulp.LpMaximize if objective == "impact" else pulp.LpMinimize
        )
        self.exact = problem.n_layer * problem.n_ff <= EXACT
        self.ends = [self._segments(i) for i in range(problem.n_layer)]
        self.uses_card = budgets.vram > problem.costs.scratch
        self.limits_ram = budgets.ram is not None and budgets.ram < problem.costs.needed
        self.spills = self.limits_ram and problem.machine.disk is not None
        self.uses_disk = self.spills and objective == "time"
        self.unit_bytes = problem.costs.needed / SCALE
        self.unit_s = problem.seconds(_all_in_ram(problem)) / SCALE
        self._add_variables()
        self._add_budgets()
        self._add_objective()

    def _segments(self, i: int) -> Ints:
        p = self.problem
        if self.exact:
            return np.arange(p.n_ff + 1)
        return segment_ends(p.fired[i], int(p.always[i]), SEGMENTS[self.objective])

    def _add_variables(self) -> None:
        layers = range(self.problem.n_layer)
        share = "Binary" if self.exact else "Continuous"
        add = self.lp.add_variable

        def segments(name: str, used: bool) -> list[list[Any]]:
            return [
                [add(f"{name}_{i}_{s}", 0, 1, share) for s in range(len(self.ends[i]) - 1)] if used else []
                for i in layers
            ]

        self.card = segments("card", self.uses_card)
        self.memory = segments("memory", self.uses_disk)
        self.dense = [add(f"dense_{i}", cat="Binary") for i in layers] if self.uses_card else []
        self.head = add("head", cat="Binary") if self.uses_card else None
        for i in layers:
            self._keep_order(self.card[i])
            either = [a + b for a, b in zip(self.card[i], self.memory[i], strict=False)]
            for share_of_both in either:
                self.lp += share_of_both <= 1
            self._keep_order(either or self.memory[i])

    def _keep_order(self, shares: list[Any]) -> None:
        if self.exact:
            for before, after in pairwise(shares):
                self.lp += before >= after

    def _add_budgets(self) -> None:
        p, budgets = self.problem, self.budgets
        if self.uses_card:
            card = self._block_bytes() + self._card_bytes()
            self.lp += _sum(card) <= (budgets.vram - p.costs.scratch) / self.unit_bytes, "vram"
        if budgets.ram is not None and self.limits_ram and self.objective != "ram":
            self.lp += self._ram_bytes() <= budgets.ram / self.unit_bytes, "ram"

    def _block_bytes(self) -> list[tuple[Any, float]]:
        blocks = self.problem.dense + self.problem.kv
        return [
            *zip(self.dense, blocks / self.unit_bytes, strict=True),
            (self.head, self.problem.costs.head / self.unit_bytes),
        ]

    def _card_bytes(self, bundles: bool = True) -> list[tuple[Any, float]]:
        p = self.problem
        terms: list[tuple[Any, float]] = []
        for i, ends in enumerate(self.ends if self.uses_card else []):
            stored = p.beside_bytes(i, ends) + (ends * p.bundle[i] if bundles else 0)
            terms += zip(self.card[i], np.diff(stored) / self.unit_bytes, strict=True)
        return terms

    def _ram_bytes(self) -> Any:
        """Units in ram: all but what is in vram; where a disk can take the bundles, only those that `memory` keeps."""
        p = self.problem
        without_card = _all_in_ram(p)
        if self.spills:
            without_card = replace(without_card, ram=without_card.vram)
        terms = self._block_bytes() if self.uses_card else []
        terms = [(x, -size) for x, size in terms + self._card_bytes(bundles=not self.spills)]
        for i, ends in enumerate(self.ends):
            terms += zip(self.memory[i], np.diff(ends) * p.bundle[i] / self.unit_bytes, strict=False)
        return _sum(terms) + p.bytes(without_card)[1] / self.unit_bytes

    def _add_objective(self) -> None:
        if self.objective == "impact":
            self._maximise_impact()
        elif self.objective == "time":
            self._minimise_time()
        else:
            self.lp += self._ram_bytes()

    def _maximise_impact(self) -> None:
        p = self.problem
        terms = [] if self.head is None else [*zip(self.dense, p.block_impact, strict=True), (self.head, p.head_impact)]
        for i, least in enumerate(p.least() if self.uses_card else []):
            terms += zip(self.card[i], np.diff(p.fired[i, self.ends[i]]), strict=True)
            used = self.lp.add_variable(f"used_{i}", cat="Binary")
            sizes = np.diff(self.ends[i])
            neurons = _sum(list(zip(self.card[i], sizes, strict=True)))
            self.lp += neurons >= int(least) * used  # equation 7
            self.lp += neurons <= p.n_ff * used  # equation 8, K = N_l
            if least > p.n_ff:
                self.lp += used <= 0
        self.lp += _sum(terms)

    def _minimise_time(self) -> None:
        p = self.problem
        terms: list[tuple[Any, float]] = []
        constant = float(p.dense_seconds(p.machine.ram).sum()) + p.costs.head / p.machine.ram.sequential
        for i in range(p.n_layer):
            layer = self.lp.add_variable(f"layer_{i}", 0)
            terms.append((layer, 1.0))
            self.lp += layer >= self._processor_share(i)
            if self.uses_card:
                self.lp += layer >= self._shares(self.card[i], p.tier_seconds(p.vram, i, self.ends[i]))
                terms.append((self._both(i), p.hand_over_s / self.unit_s))
            if self.uses_disk:
                terms.append((self._touches_disk(i), p.disk.latency_s / self.unit_s))
        if self.uses_card:
            saved = p.dense_seconds(p.vram) - p.dense_seconds(p.machine.ram)
            terms += zip(self.dense, saved / self.unit_s, strict=True)
            terms.append(
                (self.head, p.costs.head * (1 / p.vram.sequential - 1 / p.machine.ram.sequential) / self.unit_s)
            )
            terms += [(change, p.hand_over_s / 2 / self.unit_s) for change in self._changes()]
        self.lp += _sum(terms) + constant / self.unit_s

    def _processor_share(self, i: int) -> Any:
        """Time of what layer i has in ram and on disk."""
        p, ends = self.problem, self.ends[i]
        ram = p.tier_seconds(p.machine.ram, i, ends)
        if not self.uses_disk:
            return float(ram[-1]) / self.unit_s - self._shares(self.card[i], ram)
        disk = p.disk_seconds(i, ends)
        return (
            float(disk[-1]) / self.unit_s - self._shares(self.card[i], disk) - self._shares(self.memory[i], disk - ram)
        )

    def _shares(self, shares: list[Any], seconds: Floats) -> Any:
        return _sum(list(zip(shares, np.diff(seconds) / self.unit_s, strict=False)))

    def _both(self, i: int) -> Any:
        """0 only where the layer is on one side: no segment in vram, not even the first, or all, even the last."""
        both = self.lp.add_variable(f"both_{i}", 0, 1)
        self.lp += both >= self.card[i][0] - self.dense[i]
        self.lp += both >= self.dense[i] - self.card[i][-1]
        return both

    def _touches_disk(self, i: int) -> Any:
        disk = self.lp.add_variable(f"disk_{i}", 0, 1)
        self.lp += disk + self.memory[i][-1] + (self.card[i][-1] if self.uses_card else 0) >= 1
        return disk

    def _changes(self) -> list[Any]:
        sides: list[Any] = [0, *self.dense, self.head, 0]
        changes = []
        for n, (a, b) in enumerate(pairwise(sides)):
            change = self.lp.add_variable(f"change_{n}", 0, 1)
            self.lp += change >= a - b
            self.lp += change >= b - a
            changes.append(change)
        return changes

    def relax(self) -> Prices | None:
        """What bytes are worth where blocks may be cut: the dual values of the relaxed program; None: no solution."""
        if solve(self.lp, 0.0, TIME_LIMIT_S, relaxed=True) != "optimal":
            return None

        def price(name: str) -> float:
            row = self.lp.get_constraint_by_name(name)
            return 0.0 if row is None else max(abs(row.pi or 0.0), LEAST) * self.unit_s / self.unit_bytes

        return Prices(price("vram"), price("ram"))

    def branch(self, time_limit_s: float = TIME_LIMIT_S) -> tuple[str, Plan | None]:
        """Solves it with its binaries: (status as in `solve`, plan). Optimal means within GAP, or exact where it is."""
        status = solve(self.lp, 0.0 if self.exact else GAP[self.objective], time_limit_s)
        return status, self.read() if status in ("optimal", "stopped") else None

    def value(self) -> float:
        """The objective after `branch`: milliseconds, or impact."""
        objective = self.lp.objective
        assert objective is not None
        value = sum(factor * (x.value() or 0.0) for x, factor in objective.items()) + objective.constant
        return float(value) if self.objective == "impact" else float(value) * self.unit_s * 1e3

    def bound(self) -> float:
        """A value that no plan beats, after `branch` was optimal; GAP and the segments' averages are allowed for."""
        p = self.problem
        if self.exact:
            return self.value() * (1 + DIGITS if self.objective == "impact" else 1 - DIGITS)
        gap = GAP[self.objective]
        short = np.array([shortfall(p.fired[i], ends) for i, ends in enumerate(self.ends)])
        if self.objective == "impact":
            return self.value() / (1 - gap) + float(short.sum())
        per_firing = p.firing_seconds(p.machine.ram) if self.uses_card else np.zeros(p.n_layer)
        if self.uses_disk:
            per_firing = per_firing + p.firing_seconds(p.disk)
        return self.value() * (1 - gap) - float(short @ per_firing) * 1e3

    def read(self) -> Plan:
        """The plan that the variables hold, in whole neurons and blocks."""
        n, n_ff = self.problem.n_layer, self.problem.n_ff
        vram = np.zeros(n, np.int64)
        ram = np.full(n, n_ff, np.int64)
        for i, ends in enumerate(self.ends):
            sizes = np.diff(ends)
            if self.uses_card:
                vram[i] = int(_values(self.card[i]) @ sizes + 1e-6)
            if self.uses_disk:
                ram[i] = min(n_ff, vram[i] + int(_values(self.memory[i]) @ sizes + 1e-6))
        blocks = _values([*self.dense, self.head]) > 0.5 if self.uses_card else np.zeros(n + 1, bool)
        return Plan(blocks[:n], bool(blocks[n]), vram, ram)


def _sum(terms: Sequence[tuple[Any, float]]) -> Any:
    from pulp import LpAffineExpression

    return LpAffineExpression([(x, float(value)) for x, value in terms])


def _values(variables: Sequence[Any]) -> Floats:
    return np.array([variable.value() or 0.0 for variable in variables])


def solve(lp: Any, gap: float, time_limit_s: float, relaxed: bool = False) -> str:
    """The only call of a solver; returns its status, and variables have values only where that says so.

    optimal (within `gap`), stopped (time limit; a feasible answer), infeasible, failed (no answer).
    """
    import pulp
    from pulp.apis.coin_api import COIN_CMD, pulp_cbc_path
    from pulp.apis.core import PulpSolverError

    solver = COIN_CMD(  # type: ignore[no-untyped-call]
        path=pulp_cbc_path, msg=False, mip=not relaxed, threads=1, gapRel=gap, timeLimit=time_limit_s,
        options=["randomSeed 1", "randomCbcSeed 1"],
    )  # fmt: skip
    try:
        lp.solve(solver)
    except PulpSolverError:
        return "failed"
    meaning = {
        pulp.LpSolutionOptimal: "optimal",
        pulp.LpSolutionIntegerFeasible: "stopped",
        pulp.LpSolutionInfeasible: "infeasible",
    }
    return meaning.get(lp.sol_status, "failed")


def _all_in_ram(problem: Problem) -> Plan:
    none = np.zeros(problem.n_layer, np.int64)
    return Plan(none > 0, False, none, none + problem.n_ff)


def smallest_ram(problem: Problem, vram: int) -> int:
    """The least ram in bytes with which a plan exists beside a vram budget, for a plan that is known to fit in it."""
    plan = _all_in_ram(problem)
    program = Program(problem, Budgets(vram, 0), "ram")
    if program.uses_card and solve(program.lp, GAP[program.objective], TIME_LIMIT_S) in ("optimal", "stopped"):
        plan = program.read()
    if program.spills:
        plan = replace(plan, ram=plan.vram)
    return problem.bytes(plan)[1]
