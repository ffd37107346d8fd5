"""The plans that gpu.py compares: what they take on the card, and in which order."""

import numpy as np
import pytest

from benchmarks import gpu_plans as plans
from benchmarks.placement import PC_HIGH
from benchmarks.shapes import Shape
from powerinfer_tools.placement.hottest import bounds, hottest_first
from powerinfer_tools.placement.problem import Plan, Problem

ACTIVE, CTX = 0.1, 64
LLAMA = Shape("llama", 4, 256, 1024, 4, 2, n_vocab=1000, n_ctx=128)
FALCON = Shape("falcon", 4, 256, 1024, 4, 1, arch="falcon", n_vocab=1000, n_ctx=128)
SHAPES = pytest.mark.parametrize("shape", [LLAMA, FALCON], ids=lambda shape: shape.name)
SHARES = pytest.mark.parametrize("share", [1.0, 0.75, 0.5, 0.25, 0.1, 0.0])


def sparse(shape: Shape) -> Problem:
    return plans.sparse_problem(shape, "q4_0", ACTIVE, PC_HIGH, CTX)


def vram(shape: Shape, share: float) -> int:
    return plans.budget(sparse(shape), share)


def is_at_bounds(plan: Plan, problem: Problem) -> bool:
    return all(k in row for k, row in zip(plan.vram.tolist(), bounds(problem), strict=True))


@SHAPES
@SHARES
def test_whole_layers_are_as_many_as_fit_from_the_last_on(shape: Shape, share: float) -> None:
    problem, room = plans.dense_problem(shape, "q4_0", PC_HIGH, CTX), vram(shape, share)
    plan = plans.whole_layers(problem, room)
    n = int(plan.dense.sum())
    assert plan.dense.tolist() == [False] * (shape.n_layer - n) + [True] * n
    assert plan.vram.tolist() == [shape.n_ff if there else 0 for there in plan.dense]
    assert plans.card_bytes(problem, plan) <= room or n == 0
    if n < shape.n_layer:
        more = np.arange(shape.n_layer) >= shape.n_layer - n - 1
        fuller = Plan(more, False, np.where(more, shape.n_ff, 0), plan.ram)
        assert plans.card_bytes(problem, fuller) > room


@SHAPES
def test_with_room_for_all_every_plan_is_the_whole_model(shape: Shape) -> None:
    problem, room = sparse(shape), vram(shape, 1.0)
    dense = plans.dense_problem(shape, "q4_0", PC_HIGH, CTX)
    whole = plans.everything(problem)
    for plan in (hottest_first(problem, room), plans.drawn(problem, room)):
        assert plans.same(plan, whole)
    assert plans.same(plans.whole_layers(dense, room), whole)
    assert not plans.same(plans.nothing(problem), whole)


@SHAPES
@SHARES
def test_plans_keep_the_budget_and_divide_where_the_engine_can(shape: Shape, share: float) -> None:
    problem, room = sparse(shape), vram(shape, share)
    for plan in (
        plans.found(problem, room),
        hottest_first(problem, room),
        plans.drawn(problem, room),
    ):
        assert plans.card_bytes(problem, plan) <= room or plans.same(plan, plans.nothing(problem))
        assert is_at_bounds(plan, problem)


@SHAPES
@SHARES
def test_no_plan_is_foretold_to_be_faster_than_the_one_that_is_found(shape: Shape, share: float) -> None:
    problem, room = sparse(shape), vram(shape, share)
    found = float(problem.seconds(plans.found(problem, room)))
    assert found <= float(problem.seconds(hottest_first(problem, room)))
    for seed in range(3):
        assert found <= float(problem.seconds(plans.drawn(problem, room, seed)))


def test_hottest_first_takes_blocks_before_neurons_and_hot_ones_before_cold() -> None:
    problem = sparse(LLAMA)
    few, more = (hottest_first(problem, vram(LLAMA, share)) for share in (0.3, 0.6))
    assert few.head
    assert few.dense.all()
    assert 0 < few.vram.sum() < more.vram.sum()
    ranks = [row.index(k) for row, k in zip(bounds(problem), more.vram.tolist(), strict=True)]
    assert max(ranks) - min(ranks) <= 1  # the layers are alike


def test_random_plans_are_drawn_by_their_seed() -> None:
    problem, room = sparse(LLAMA), vram(LLAMA, 0.5)
    first, again, other = (plans.drawn(problem, room, seed) for seed in (1, 1, 2))
    assert plans.same(first, again)
    assert not plans.same(first, other)


def test_a_dense_run_reads_everything_and_needs_no_predictor() -> None:
    dense, mine = plans.dense_problem(LLAMA, "q4_0", PC_HIGH, CTX), sparse(LLAMA)
    assert dense.costs.weights < mine.costs.weights
    assert float(dense.seconds(plans.nothing(dense))) == pytest.approx(
        (dense.costs.head + sum(layer.weights - layer.table + layer.kv / 2 for layer in dense.costs.layers))
        / PC_HIGH.ram.sequential
    )
