"""Bytes per token against the artifact's own table, and the always-computed prefix against brute force."""

from dataclasses import replace

import numpy as np
import pytest

from powerinfer_tools.artifact.layout import MODE_GATE, MODE_PREDICTOR, QUANTS, LayerPlan, tensor_table
from powerinfer_tools.checkpoint import Config, Rope
from powerinfer_tools.predictors.select import FfnCosts

CONFIG = Config(
    arch="llama",
    name="planned",
    n_layer=1,
    n_embd=256,
    n_ff=512,
    n_head=4,
    n_head_kv=2,
    head_dim=64,
    n_vocab=300,
    n_ctx=256,
    norm_eps=1e-5,
    activation="relu",
    gated=True,
    tied=False,
    rope=Rope(np.ones(32, dtype=np.float32)),
    thresholds=(0.0,),
)


def ffn_bytes(config: Config, plan: LayerPlan, quant: str) -> int:
    """What the layer's FFN matrices and predictor hold in the artifact."""
    parts = ("ffn_select", "ffn_neurons", "predictor_in", "predictor_out")
    table = tensor_table(config, [plan], quant, frozenset())
    return sum(tensor.n_bytes for tensor in table if any(part in tensor.name for part in parts))


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("gated", [True, False])
def test_a_token_that_fires_everything_reads_all_that_the_artifact_holds(quant, gated):
    config = replace(CONFIG, gated=gated)
    costs = FfnCosts.of(config, quant)
    assert costs.gate(config.n_ff) == ffn_bytes(config, LayerPlan(MODE_GATE), quant)
    for rank, always in ((32, 0), (64, 100), (32, config.n_ff)):
        plan = LayerPlan(MODE_PREDICTOR, rank, always)
        assert costs.predictor(rank, always, config.n_ff, config.n_ff) == ffn_bytes(config, plan, quant)


def test_always_is_the_cheapest_prefix():
    costs = FfnCosts.of(CONFIG, "q4_0")
    rng = np.random.default_rng(0)
    for _ in range(20):
        share = np.sort(rng.beta(0.3, 0.5, CONFIG.n_ff))[::-1]
        bytes_of = [costs.predictor(32, a, a + share[a:].sum(), 0) for a in range(CONFIG.n_ff + 1)]
        assert bytes_of[costs.always(32, share)] == pytest.approx(min(bytes_of))


def test_nothing_is_always_computed_where_little_is_let_through():
    assert FfnCosts.of(CONFIG, "q4_0").always(32, np.full(CONFIG.n_ff, 0.2)) == 0
