"""Placement as a linear program with few binaries, for CBC by PuLP.

A layer's neurons, in stored order, fall into segments. Variables, for layer i and segment s:

    card[i, s], memory[i, s] in 0..1   share of the segment in vram, in ram; the rest is on disk
    dense[i], head in {0, 1}           the block is in vram
    longer[i]                          the longer of the two processors' shares of the FFN
    both[i], disk[i] in {0, 1}         both processors take part; some neurons are on disk
    change[i]                          the hidden state moves to the other side

A segment's neurons count with their mean, and firing frequencies fall, so that filling segments in order is best and
needs no binaries. What it does:

    relax    the dual values of the budgets are what a byte is worth, from which `bound` proves bounds
    branch   where these leave a gap: a bound with the binaries branched on
    best     a tiny problem solved whole, each segment one neuron, in a memory or not: its plan is the best there is
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from powerinfer_tools.placement.bound import Prices, bend_knots
from powerinfer_tools.placement.objective import Curve, Objective
from powerinfer_tools.placement.problem import Budgets, Ints, Plan, Problem

SEGMENTS, LEAST_SEGMENTS = 512, 16  # of all layers; of one
GROUP = 64  # neurons: the finest segment boundary of a large layer (PowerInfer, section 6.3.2)
TINY = 24  # neurons of all layers up to which a problem is solved whole
SCALE = 1e4  # the program counts in parts of all bytes and of the cost of all in ram, whatever the model's size
LEAST = 1e-2  # price in the program's units: where hand-overs alone decide, the relaxed program sees none
DIGITS = 1e-7  # relative: to which the solver writes its values
GAP, NODES = 1e-4, 50  # where branching stops
Terms = list[tuple[Any, float]]  # variables and their factors


class Program:
    """One problem under budgets."""

    def __init__(self, problem: Problem, objective: Objective, budgets: Budgets) -> None:
        import pulp

        self.problem, self.objective, self.budgets = problem, objective, budgets
        self.lp = pulp.LpProblem("placement", pulp.LpMinimize)  # type: ignore[no-untyped-call]
        self.whole = problem.n_layer * problem.n_ff <= TINY
        self.kind = (
            "Continuous" if self.whole else "Binary"
        )  # of what says that a layer has some: whole shares imply it
        self.ends = [self._segments(i) for i in range(problem.n_layer)]
        self.uses_card = problem.machine.vram is not None and budgets.vram > problem.costs.card_fixed
        self.limits_ram = budgets.ram < problem.costs.needed
        self.uses_disk = self.limits_ram and problem.machine.disk is not None
        self.byte = problem.costs.needed / SCALE
        self.unit = objective.all_in_ram(problem) / SCALE
        self._add_variables()
        self._add_budgets()
        self._add_cost()

    def relax(self) -> Prices | None:
        """What bytes are worth where all may be cut: the dual values of the relaxed program; None: no solution."""
        if solve(self.lp, relaxed=True) != "optimal":
            return None

        def price(name: str) -> float:
            row = self.lp.get_constraint_by_name(name)
            return 0.0 if row is None else max(abs(row.pi or 0.0), LEAST) * self.unit / self.byte

        return Prices(price("vram"), price("ram"))

    def branch(self) -> float:
        """A cost that no plan beats, what lies between the segments' ends allowed for; -inf: none was proved."""
        if solve(self.lp, GAP, NODES) != "optimal":
            return -np.inf
        o, cost = self.objective, self.lp.objective
        assert cost is not None
        value = sum(factor * (x.value() or 0.0) for x, factor in cost.items())
        value -= (GAP + DIGITS) * abs(value)
        short = np.array([o.short(i, ends) for i, ends in enumerate(self.ends)]).sum(axis=0)
        short = short[0] * self.uses_card + short[1] * self.uses_disk
        return float(value * self.unit + o.blocks[0].sum() + o.head[0] - short)

    def best(self) -> Plan | None:
        """The best plan of a problem that is solved whole; None: there is none, or no solver."""
        return self._read() if solve(self.lp) == "optimal" else None

    def _segments(self, i: int) -> Ints:
        """Ends of layer i's segments, and 0: dense where the firing curve bends; `always` is an end of its own."""
        p = self.problem
        if self.whole:
            return np.arange(p.n_ff + 1)
        n = max(LEAST_SEGMENTS, SEGMENTS // p.n_layer)
        ends = bend_knots(p.fired[i], n, min(GROUP, -(-p.n_ff // n)))
        return np.union1d(ends, min(int(p.always[i]), p.n_ff))

    def _add_variables(self) -> None:
        add, share = self.lp.add_variable, "Binary" if self.whole else "Continuous"

        def shares(name: str, used: bool) -> list[list[Any]]:
            n_segments = [len(ends) - 1 if used else 0 for ends in self.ends]
            return [[add(f"{name}_{i}_{s}", 0, 1, share) for s in range(n)] for i, n in enumerate(n_segments)]

        self.card, self.memory = shares("card", self.uses_card), shares("memory", self.uses_disk)
        names = [*(f"dense_{i}" for i in range(self.problem.n_layer)), "head"]
        self.blocks = [add(name, cat="Binary") for name in names if self.uses_card]
        for card, memory in zip(self.card, self.memory, strict=True):
            either = [a + b for a, b in zip(card, memory, strict=False)]
            for both in either:
                self.lp += both <= 1
            for before, after in [*pairwise(card), *pairwise(either or memory)] if self.whole else []:
                self.lp += before >= after

    def _add_budgets(self) -> None:
        p, budgets = self.problem, self.budgets
        memory = self._steps(self.memory, p.bundle_bytes)
        if self.uses_card:
            on_card = [*zip(self.blocks, np.append(p.card_block, p.costs.card_head), strict=True)]
            on_card += self._steps(self.card, p.card_bytes)
            self.lp += _sum(on_card, self.byte) <= (budgets.vram - p.costs.card_fixed) / self.byte, "vram"
        blocks = list(zip(self.blocks, np.append(p.block, p.costs.head), strict=False))
        # with a disk, bundles that `memory` does not keep are not in ram
        card = self._steps(self.card, p.beside_bytes if self.uses_disk else p.stored_bytes)
        if self.limits_ram:
            in_ram = np.full(p.n_layer, 0 if self.uses_disk else p.n_ff)
            room = budgets.ram - p.bytes(Plan(in_ram < 0, False, in_ram * 0, in_ram))[1]
            self.lp += _sum(memory, self.byte) - _sum(blocks + card, self.byte) <= room / self.byte, "ram"

    def _add_cost(self) -> None:
        o, layers = self.objective, range(self.problem.n_layer)
        terms = [(self._longer(i), self.unit) for i in layers]
        if self.uses_card:
            terms += zip(self.blocks, np.append(o.blocks[1] - o.blocks[0], o.head[1] - o.head[0]), strict=True)
            terms += [(self._both(i), o.hand_over) for i in layers]
            terms += [(change, o.hand_over / 2) for change in self._changes()]
        if self.uses_disk:
            terms += [(self._touches_disk(i), o.latency) for i in layers]
        self.lp += _sum(terms, self.unit)

    def _steps(self, shares: list[list[Any]], curve: Curve, layers: Sequence[int] | None = None) -> Terms:
        """Each segment's share with what the curve rises over it."""
        rises = [
            zip(shares[i], np.diff(curve(i, self.ends[i])), strict=False)
            for i in (range(self.problem.n_layer) if layers is None else layers)
        ]
        return [term for layer in rises for term in layer]

    def _longer(self, i: int) -> Any:
        """The card's share, or the processor's: all that vram and ram do not take is on disk, if there is one."""
        o, longer = self.objective, self.lp.add_variable(f"longer_{i}", 0)
        slow = o.disk if self.uses_disk else o.ram
        saved = self._steps(self.card, slow, [i])
        saved += self._steps(self.memory, lambda i, k: slow(i, k) - o.ram(i, k), [i])
        self.lp += longer >= float(slow(i, self.problem.n_ff)) / self.unit - _sum(saved, self.unit)
        if self.uses_card:
            self.lp += longer >= _sum(self._steps(self.card, o.card, [i]), self.unit)
        return longer

    def _both(self, i: int) -> Any:
        """0 only where the layer is on one side: all its segments are where its block is."""
        dense, both = self.blocks[i], self.lp.add_variable(f"both_{i}", 0, 1, self.kind)
        for share in self._telling(self.card[i]):
            self.lp += both >= share - dense
            self.lp += both >= dense - share
        if (least := int(self.objective.least[i])) > 1:  # so many neurons or none
            some = self.lp.add_variable(f"some_{i}", cat="Binary")
            for share in self._telling(self.card[i]):
                self.lp += share <= some
            self.lp += _sum(self._steps(self.card, lambda i, k: k, [i]), 1.0) >= least * some
        return both

    def _touches_disk(self, i: int) -> Any:
        """0 only where all its segments are in vram or ram."""
        disk = self.lp.add_variable(f"disk_{i}", 0, 1, self.kind)
        both = [a + b for a, b in zip(self.card[i], self.memory[i], strict=False)]
        for share in self._telling(both or self.memory[i]):
            self.lp += disk + share >= 1
        return disk

    def _telling(self, shares: list[Any]) -> list[Any]:
        """The shares that say whether a layer has some segment or none: the ends, where order is kept."""
        return [shares[0], shares[-1]] if self.whole else shares

    def _changes(self) -> list[Any]:
        sides: list[Any] = [0, *self.blocks, 0]
        changes = []
        for n, (a, b) in enumerate(pairwise(sides)):
            change = self.lp.add_variable(f"change_{n}", 0, 1)
            self.lp += change >= a - b
            self.lp += change >= b - a
            changes.append(change)
        return changes

    def _read(self) -> Plan:
        """The plan that the variables hold."""
        n, n_ff = self.problem.n_layer, self.problem.n_ff
        vram, memory = (np.array([_ones(layer) for layer in shares]) for shares in (self.card, self.memory))
        blocks = np.array([_ones([block]) == 1 for block in self.blocks] or [False] * (n + 1))
        return Plan(blocks[:n], bool(blocks[n]), vram, vram + memory if self.uses_disk else np.full(n, n_ff))


def _sum(terms: Terms, unit: float) -> Any:
    from pulp import LpAffineExpression

    return LpAffineExpression([(x, float(value) / unit) for x, value in terms])


def _ones(variables: Sequence[Any]) -> int:
    return sum((variable.value() or 0.0) > 0.5 for variable in variables)


def solve(lp: Any, gap: float = 0.0, n_nodes: int | None = None, relaxed: bool = False) -> str:
    """The only call of a solver; returns its status, and variables have values only where that says so.

    optimal (within `gap`, relative), stopped (at so many nodes; a feasible answer), infeasible, failed (no answer).
    """
    import pulp
    from pulp.apis.coin_api import COIN_CMD, pulp_cbc_path
    from pulp.apis.core import PulpSolverError

    solver = COIN_CMD(  # type: ignore[no-untyped-call]
        path=pulp_cbc_path, msg=False, mip=not relaxed, threads=1, gapRel=gap, maxNodes=n_nodes,
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
