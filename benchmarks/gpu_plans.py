"""What the card holds within a budget: as the program finds it, and the plans that it is compared with.

ours            the program's own search for the fastest plan
hottest first   output head and dense blocks, which every token needs, then the neurons that fire most, of all layers;
                the program's own plan is never foretold to be slower
random          head, dense blocks and shares of the layers' neurons, drawn until the budget is spent; within a
                layer they are still its hottest, as the engine has it, so that this is stronger than it sounds
whole layers    attention and all neurons of as many layers as fit, from the last on, then the head: what llama.cpp
                does; it runs dense, and is not charged for predictors, which it does not use
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from benchmarks.shapes import RANK, Planted, Shape, frequencies, shape_config
from powerinfer_tools.artifact.layout import MODE_GATE, MODE_PREDICTOR, LayerPlan
from powerinfer_tools.placement import Machine
from powerinfer_tools.placement.card import best_plan, card_problem
from powerinfer_tools.placement.hottest import NEURONS, blocks, bounds, one_by_one
from powerinfer_tools.placement.problem import Bools, Budgets, Ints, Plan, Problem


@dataclass(frozen=True)
class Fires:
    """Each layer's neurons fire with the same frequencies, which is what shapes.py plants."""

    each: npt.NDArray[np.float64]
    n_layer: int
    digest: str = "planted"

    @property
    def n_ff(self) -> int:
        return len(self.each)

    def frequency(self, i: int, /) -> npt.NDArray[np.float64]:
        return self.each


def sparse_problem(
    shape: Shape, quant: str, active: float, machine: Machine, ctx_size: int, lends: bool = False
) -> Problem:
    """The model as shapes.py writes it, run sparsely. lends: the card has room for neurons that are lent to it, too."""
    plan = LayerPlan(MODE_PREDICTOR, RANK, 0)
    return _problem(shape, quant, plan, frequencies(shape.n_ff, active), machine, ctx_size, lends)


def dense_problem(shape: Shape, quant: str, machine: Machine, ctx_size: int, lends: bool = False) -> Problem:
    """The same model run dense: no predictor, all neurons, read in sequence."""
    return _problem(shape, quant, LayerPlan(MODE_GATE), np.ones(shape.n_ff), machine.in_sequence, ctx_size, lends)


def _problem(
    shape: Shape,
    quant: str,
    plan: LayerPlan,
    fires: npt.NDArray[np.float64],
    machine: Machine,
    ctx_size: int,
    lends: bool,
) -> Problem:
    config = shape_config(shape)
    biases = frozenset(name for name in Planted(config).names())
    return card_problem(
        config,
        [plan] * config.n_layer,
        Fires(fires, config.n_layer),
        machine,
        quant=quant,
        biases=biases,
        ctx_size=ctx_size,
        threads=machine.threads,
        lends=lends,
    )


def everything(problem: Problem) -> Plan:
    """The whole model on the card."""
    return _plan(problem, np.ones(problem.n_layer, bool), True, np.full(problem.n_layer, problem.n_ff))


def nothing(problem: Problem) -> Plan:
    """The processor alone."""
    return Plan.in_ram(problem.n_layer, problem.n_ff)


def budget(problem: Problem, share: float) -> int:
    """Bytes of the card: a share of all weights and KV cache there, and what beside them does not shrink with them."""
    fixed = problem.costs.card_fixed
    return fixed + int(share * (card_bytes(problem, everything(problem)) - fixed))


def found(problem: Problem, vram: int) -> Plan:
    """The plan that the program finds for so many bytes of the card."""
    return best_plan(problem, Budgets(vram, problem.costs.needed))


def whole_layers(problem: Problem, vram: int) -> Plan:
    """problem: the dense one."""
    n = problem.n_layer

    def last(n_layers: int, head: bool) -> Plan:
        there = np.arange(n) >= n - n_layers
        return _plan(problem, there, head, np.where(there, problem.n_ff, 0))

    most = max((k for k in range(n + 1) if card_bytes(problem, last(k, False)) <= vram), default=0)
    return last(most, card_bytes(problem, last(most, True)) <= vram)


def drawn(problem: Problem, vram: int, seed: int = 0) -> Plan:
    """The random plan."""
    items = [*blocks(problem), *((NEURONS, i) for i, row in enumerate(bounds(problem)) for _ in row[1:])]
    order = np.random.default_rng(seed).permutation(len(items))
    return one_by_one(problem, vram, [items[i] for i in order])


def same(a: Plan, b: Plan) -> bool:
    """Whether they have the same on the card."""
    return bool(a.head) == bool(b.head) and np.array_equal(a.dense, b.dense) and np.array_equal(a.vram, b.vram)


def _plan(problem: Problem, dense: Bools, head: bool, k1: Ints) -> Plan:
    """Nothing on disk."""
    return Plan(dense, head, k1, np.full(problem.n_layer, problem.n_ff))


def card_bytes(problem: Problem, plan: Plan) -> int:
    """What a plan takes on the card."""
    return int(problem.bytes(plan)[0])
