"""Bytes: every tensor is counted once, wherever it is placed."""

import numpy as np
import pytest

from powerinfer_tools.artifact.layout import tensor_table
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.placement import artifact_costs
from powerinfer_tools.placement.problem import Plan
from tests.placement import worlds

EVERY_BIAS = frozenset(
    f"blk.{i}.{name}.bias" for i in range(12) for name in ("attn_q", "ffn_gate", "ffn_up", "ffn_down", "attn_norm")
)


@pytest.mark.parametrize("mode", ["gate", "predictor", "mixed"])
@pytest.mark.parametrize("quant", ["f32", "f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_costs_are_the_sum_of_the_artifacts_tensors(mode: str, quant: str, gated: bool, tied: bool) -> None:
    config, plans = worlds.config(12, 96, gated=gated, tied=tied), worlds.plans(12, mode)
    costs = artifact_costs(config, plans, quant=quant, biases=EVERY_BIAS, ctx_size=64)
    table = tensor_table(config, plans, quant, EVERY_BIAS)
    assert costs.weights == sum(tensor.n_bytes for tensor in table)
    for i, layer in enumerate(costs.layers):
        assert layer.weights == sum(tensor.n_bytes for tensor in table if tensor.name.startswith(f"blk.{i}."))


def test_kv_cache_is_two_halves_of_two_bytes() -> None:
    costs = artifact_costs(worlds.config(3), worlds.plans(3), quant="f16", biases=worlds.BIASES, ctx_size=100)
    assert costs.kv == 2 * 3 * 100 * 2 * 16 * 2


@pytest.mark.parametrize("mode", ["gate", "predictor", "mixed"])
def test_every_plan_holds_all_weights_in_its_tiers(mode: str) -> None:
    problem = worlds.problem(5, 96, mode=mode)
    draw = np.random.default_rng(0)
    for _ in range(20):
        k1, k2 = np.sort(draw.integers(0, 97, (2, 5)), axis=0)
        plan = Plan(draw.random(5) < 0.5, bool(draw.random() < 0.5), k1, k2)
        moved = problem.block * plan.dense + problem.stored_bytes(problem.each, plan.vram)
        unpadded = int(moved.sum()) + problem.costs.head * plan.head
        card, ram, disk = problem.bytes(plan)
        assert unpadded + ram + disk == problem.costs.weights + problem.costs.kv + problem.costs.scratch
        assert unpadded <= card - problem.costs.card_fixed <= unpadded * 48 / 34  # the shortest rows


def test_rows_on_a_card_are_padded_to_16_bytes_and_contexts_counted() -> None:
    plans = worlds.plans(4, "mixed")
    how = {"biases": EVERY_BIAS, "ctx_size": 64}
    for quant, row, padded in (("f32", 256, 256), ("q8_0", 68, 80), ("q4_0", 36, 48)):
        costs = artifact_costs(worlds.config(), plans, quant=quant, **how)
        gate = costs.layers[0]
        assert (gate.bundle, gate.on_card.bundle) == (2 * row, 2 * padded)
        assert gate.on_card.beside - gate.beside == padded - row  # ffn_select; biases are one row
        assert costs.card_head - costs.head == 64 * (padded - row)
        two = artifact_costs(worlds.config(), plans, quant=quant, contexts=2, card_context=1000, **how)
        assert (two.kv, two.scratch) == (2 * costs.kv, 2 * costs.scratch)
        assert two.card_fixed > costs.card_fixed + 1000


@pytest.mark.parametrize("ctx_size", [0, 129])
def test_a_context_that_the_model_does_not_have_is_refused(ctx_size: int) -> None:
    with pytest.raises(PowerinferError, match="--ctx-size: expected 1 to 128"):
        artifact_costs(worlds.config(), worlds.plans(4), quant="f16", biases=worlds.BIASES, ctx_size=ctx_size)
