"""Mixtures of experts from profile to engine: who is counted, what predictors are judged by, what decoding reads."""

from pathlib import Path

import numpy as np
import pytest
import torch

from powerinfer_tools import reference
from powerinfer_tools.activations import Activations, profile
from powerinfer_tools.activations.corpus import calibration_windows
from powerinfer_tools.artifact import split
from powerinfer_tools.artifact.layout import MODE_PREDICTOR
from powerinfer_tools.checkpoint import Experts
from powerinfer_tools.engine import Engine
from powerinfer_tools.predictors import read_predictors, train
from powerinfer_tools.progress import silent
from tests import planted
from tests.drawn import DrawnCheckpoint, drawn_config

N_EMBD, N_FF = 256, 1024
EXPERTS = Experts(4, 2, "sigmoid", "layer_input")


def made(folder: Path, **fields: object) -> tuple[DrawnCheckpoint, Path]:
    config = {"n_embd": N_EMBD, "n_ff": N_FF, "head_dim": 64, "experts": EXPERTS, **fields}
    return DrawnCheckpoint(drawn_config(**config), biases=("ffn_gate",)), planted.write_text(folder / "text")


def profiled(checkpoint: DrawnCheckpoint, text: Path, n_samples: int, **more: float) -> Activations:
    output = text.with_name("activations")
    return profile(checkpoint, [text], output, n_tokens=4096, window=128, n_samples=n_samples, progress=silent, **more)


def plant_low_rank(checkpoint: DrawnCheckpoint, rank: int = 12) -> None:
    """Gates of low rank and a little noise, few of which fire."""
    rng = np.random.default_rng(2)
    for i in range(2):
        gate = rng.standard_normal((N_FF, rank)) @ rng.standard_normal((rank, N_EMBD))
        gate /= np.linalg.norm(gate, axis=1, keepdims=True)
        gate += 0.1 * rng.standard_normal(gate.shape) / N_EMBD**0.5
        bias = rng.permutation(-(np.linspace(0, 2.5, N_FF) ** 0.7))
        checkpoint.tensors[f"blk.{i}.ffn_gate.weight"] = gate.astype(np.float32)
        checkpoint.tensors[f"blk.{i}.ffn_gate.bias"] = bias.astype(np.float32)


def test_a_neuron_counts_where_its_expert_is_chosen(tmp_path: Path) -> None:
    checkpoint, text = made(tmp_path)
    activations = profiled(checkpoint, text, n_samples=500)
    tokens = torch.from_numpy(calibration_windows(checkpoint, [text], 4096, 128))
    with torch.no_grad():
        hidden = reference.embed(checkpoint, tokens)
        for i in range(2):
            layer = reference.load_layer(checkpoint, i)
            _, x = layer.attention(hidden)
            logits = hidden @ torch.from_numpy(checkpoint.read(f"blk.{i}.ffn_router.weight")).T
            chosen = logits >= logits.topk(2).values[..., -1:]
            fires = (layer.ffn.neurons(x) != 0).unflatten(-1, (4, -1)) & chosen[..., None]
            expected = fires.flatten(2).sum((0, 1)).numpy()
            assert np.abs(activations.counts(i) - expected).sum() <= 1e-3 * expected.sum()
            routes = activations.routes(i)
            assert ((routes > 0).sum(1) == 2).all()
            np.testing.assert_allclose(routes.sum(1), 1, atol=1e-6)
            fired = activations.active(i).reshape(500, 4, -1)
            assert not fired[routes == 0].any()
            hidden = layer(hidden)


def test_a_threshold_is_the_quantile_of_those_that_take_part(tmp_path: Path) -> None:
    checkpoint, text = made(tmp_path, activation="silu")
    activations = profiled(checkpoint, text, n_samples=500, sparsity=0.6)
    for i in range(2):
        assert activations.counts(i).sum() / (4096 * N_FF * 0.5) == pytest.approx(0.4, abs=0.02)


@pytest.mark.slow
def test_predictors_are_judged_by_candidates_and_hold_in_the_engine(tmp_path: Path) -> None:
    checkpoint, text = made(tmp_path)
    plant_low_rank(checkpoint)
    activations = profiled(checkpoint, text, n_samples=2500)
    train(checkpoint, activations, tmp_path / "predictors", quant="f16", progress=silent)
    predictors = read_predictors(tmp_path / "predictors")
    split(checkpoint, activations, tmp_path / "a.gguf", predictors=predictors, quant="f16", progress=silent)
    with Engine(tmp_path / "a.gguf") as engine:
        tokens = activations.held_out()[0].tolist()
        scores = engine.score(tokens)[1]
        engine.truncate(0)
        for token in tokens:
            engine.decode(token)
        stats = engine.stats()
    for plan, figures, score in zip(predictors.plans, predictors.figures, scores, strict=True):
        assert plan.mode == MODE_PREDICTOR
        assert figures["predicted"] < 0.5  # the share of candidates
        assert score.n_hit / score.n_true == pytest.approx(figures["recall"], abs=0.02)
        assert score.n_predicted / (score.n_tokens * N_FF) == pytest.approx(figures["predicted"], rel=0.15)
    planned = sum(figures["bytes_predictor"] for figures in predictors.figures)
    router = 2 * EXPERTS.n * N_EMBD * 4
    read = (stats.bytes_predictor + stats.bytes_gate + stats.bytes_updown) / len(tokens) - router
    assert read == pytest.approx(planned, rel=0.05)
