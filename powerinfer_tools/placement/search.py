"""The best plan of a family of patterns. A pattern is left out only where its bound proves it no better than the best.

So more memory never makes the plan worse: the family does not depend on the budgets, the plan of a pattern is no worse
with more memory (see `fill`), and hence neither is the best of all. Nor does it for tiny problems, which the program
solves whole. Of others the program gives prices, from which bounds follow, and better bounds by branching; it does not
choose the plan, as the best that it finds in some time is not monotone.
"""

from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from powerinfer_tools.placement.bound import Prices, Relaxation
from powerinfer_tools.placement.family import Family
from powerinfer_tools.placement.fill import Fill, Patterns
from powerinfer_tools.placement.objective import Objective, time
from powerinfer_tools.placement.problem import NONE, SOME, Bools, Budgets, Floats, Ints, Plan, Problem
from powerinfer_tools.placement.program import Program

AT_ONCE = 1 << 21  # segments of layers that are filled at once
FIRST = 32  # patterns
ENOUGH = 1e-3  # relative gap at which the program need not branch
QUICK = 1 << 14  # patterns that a quick search looks at


@dataclass(frozen=True)
class Found:
    """The best plan, None where none fits; its cost; and a cost that no plan beats."""

    plan: Plan | None
    cost: float
    bound: float


@dataclass(frozen=True)
class Cell:
    """Patterns with the head on one side and so many dense blocks in vram: each of `card` with each of `disks`."""

    head: bool
    dense: Bools
    card: Ints
    disks: Bools

    def patterns(self, numbers: Ints) -> Patterns:
        of_card, of_disk = np.divmod(numbers, len(self.disks))
        head = np.full(len(numbers), self.head)
        return Patterns(head, self.dense[of_card], self.card[of_card], self.disks[of_disk])


class Search:
    """One problem under budgets."""

    def __init__(self, problem: Problem, objective: Objective, budgets: Budgets) -> None:
        self.problem, self.objective, self.budgets = problem, objective, budgets
        self.relaxation = Relaxation(problem, objective, budgets)
        self.family = Family(Fill(problem, objective))
        self.near, self.left = 0.0, np.inf  # relative gap that is left; patterns that may yet be looked at

    def best(self, quick: bool = False) -> Found:
        """The best plan of the family within the budgets; of a tiny problem, the best of all.

        quick: of not too many patterns, one that none is more than ENOUGH better than; its bound is not looked for.
        """
        program = Program(self.problem, self.objective, self.budgets)
        if program.whole and self.problem.divisible and (plan := program.best()):
            cost = float(self.objective.cost(plan))
            return Found(plan, cost, cost)
        bounds, prices = self.relaxation.search(program.relax() or self.relaxation.mean_price())
        self.near, self.left = (ENOUGH, QUICK) if quick else (0.0, np.inf)
        found = self._best_of_family(bounds, prices)
        bound = min(float(bounds.min()), found.cost)
        if not quick and found.cost > bound * (1 + ENOUGH):
            bound = min(max(bound, program.branch()), found.cost)
        return replace(found, bound=bound)

    def _best_of_family(self, bounds: Floats, prices: Prices) -> Found:
        """The best plan; cells and patterns are looked at by their bounds, at these prices, while these are lower."""
        found, table = Found(None, np.inf, np.inf), self.relaxation.table(prices)
        for number in np.argsort(bounds, axis=None, kind="stable").tolist():
            if self._enough(float(bounds.flat[number]), found):
                break
            cell = self.cell(*divmod(number, bounds.shape[1]))
            found = self._best_of(cell, np.maximum(self._bounds(cell, prices, table), bounds.flat[number]), found)
        return found

    def cell(self, head: int, n_dense: int) -> Cell:
        """The patterns of a cell whose least neurons fit into vram."""
        n = self.problem.n_layer
        dense, card = np.zeros((1, n), bool), np.full((1, n), NONE)
        if self.relaxation.uses_card:
            dense, card = self.family.cell(n_dense)
        low = self.family.fill.low(card)
        n_bytes = self.problem.bytes(Plan(dense, np.full(len(low), bool(head)), low, low))[0]
        disks = self.family.disks if self.relaxation.uses_disk else np.zeros((1, n), bool)
        return Cell(bool(head), dense[n_bytes <= self.budgets.vram], card[n_bytes <= self.budgets.vram], disks)

    def _bounds(self, cell: Cell, prices: Prices, table: Floats) -> Floats:
        """[card, disk]: costs that no plan of each pattern beats."""
        ends = np.zeros((len(cell.dense), 1), bool)
        sides = np.concatenate([ends, cell.dense, ends | cell.head], axis=1)
        changes = np.count_nonzero(sides[:, 1:] != sides[:, :-1], axis=1) * self.objective.hand_over / 2
        layers = table[cell.dense.astype(int), cell.card, :, self.problem.each]  # [card, layer, disk]
        fixed = self.relaxation.head(prices)[int(cell.head)] + changes - self.relaxation.worth(prices)
        return np.asarray(fixed[:, None] + _sums(layers, cell.disks))

    def _best_of(self, cell: Cell, bounds: Floats, found: Found) -> Found:
        """The better of `found` and the best plan of the cell's patterns, by rising bound."""
        order = np.argsort(bounds, axis=None, kind="stable")
        at, size = 0, FIRST
        while at < len(order) and not self._enough(float(bounds.flat[order[at]]), found):
            found = self._better(cell.patterns(order[at : at + size]), found)
            self.left -= size
            at, size = at + size, max(FIRST, AT_ONCE // self.family.fill.k.size)
        return found

    def _enough(self, bound: float, found: Found) -> bool:
        """Whether patterns that cost no less than `bound` need not be looked at."""
        return bound >= found.cost * (1 - self.near) or (self.left <= 0 and found.plan is not None)

    def _better(self, patterns: Patterns, found: Found) -> Found:
        """The better of `found` and the plans of these patterns."""
        plans, fits = self.family.fill.plans(patterns, self.budgets)
        cost = np.where(fits, self.objective.cost(plans), np.inf)
        best = int(np.argmin(cost))
        return replace(found, plan=plans.at(best), cost=float(cost[best])) if cost[best] < found.cost else found


def _sums(layers: Floats, disks: Bools) -> Floats:
    """[card, disk]: the costs of all layers, [card, layer, disk or not], for each choice of disks."""
    without, extra = layers[..., 0], np.zeros(layers.shape[:2])
    if disks.any():
        extra = layers[..., 1] - without
    return np.asarray(without.sum(axis=1)[:, None] + np.einsum("cl,dl->cd", extra, disks.astype(float)))


def fastest_in_ram(problem: Problem, plan: Plan, budgets: Budgets) -> Plan:
    """The fastest of the plans that have the same in vram."""
    family = Family(Fill(problem, time(problem)))
    disk = family.disks & (plan.vram < problem.n_ff)
    dense, vram = np.broadcast_to(plan.dense, disk.shape), np.broadcast_to(plan.vram, disk.shape)
    many = Plan(dense, np.full(len(disk), plan.head), vram, np.where(disk, vram, problem.n_ff))
    plans, fits = family.fill.with_ram(many, budgets.ram)
    return plans.at(int(np.argmin(np.where(fits, problem.seconds(plans), np.inf))))


def smallest_ram(problem: Problem, objective: Objective, vram: int) -> int:
    """The least ram in bytes with which a plan is found beside a vram budget."""
    search, least = Search(problem, objective, Budgets(vram, 0)), problem.costs.needed
    for number in product(range(2), range(problem.n_layer + 1)):
        cell = search.cell(*number)
        if not len(cell.card):
            continue
        most_none, most_some = (int(np.argmax((cell.card == card).sum(axis=1))) for card in (NONE, SOME))
        patterns = cell.patterns(np.array([most_none, most_some]) * len(cell.disks))
        patterns = replace(patterns, disk=np.full_like(patterns.disk, cell.disks.any()))
        plans, fits = search.family.fill.in_vram(patterns, vram)
        least = min([least, *problem.bytes(plans)[1][fits].tolist()])
    return least
