"""Predictors of planted models: figures hold on fresh text, modes follow the bytes, interruptions cost nothing."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from powerinfer_tools.activations import Activations, profile, read_activations
from powerinfer_tools.artifact.layout import MODE_GATE, MODE_PREDICTOR
from powerinfer_tools.checkpoint import Checkpoint, open_checkpoint
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.predictors import Predictors, read_predictors, train
from powerinfer_tools.predictors.fit import rounded
from powerinfer_tools.progress import silent
from tests import planted, tiny

KEYS = {
    "layer", "mode", "recall", "precision", "active", "predicted", "rank", "always", "threshold", "output_error",
    "bytes_gate", "bytes_predictor",
}  # fmt: skip


def profiled(checkpoint: Checkpoint, folder: Path, seed: int, **more: float) -> Activations:
    text = planted.write_text(folder / f"text.{seed}", seed=seed, n_words=4000)
    output = folder / f"activations.{seed}"
    return profile(checkpoint, [text], output, n_tokens=4096, window=128, n_samples=2500, progress=silent, **more)


@pytest.fixture(scope="module")
def low_rank(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A planted model, its profile and its predictors."""
    folder = tmp_path_factory.mktemp("low_rank")
    model = planted.make_low_rank(folder / "model")
    checkpoint = open_checkpoint(model)
    activations = profiled(checkpoint, folder, seed=0)
    train(checkpoint, activations, folder / "predictors", progress=silent)
    return model, activations.path, folder / "predictors"


def let_through(predictors: Predictors, i: int, x: np.ndarray) -> np.ndarray:
    """In numpy, as the file's description says."""
    w_in, w_out, bias = predictors.weights(i)
    z = x @ w_in.T
    return (np.maximum(z, 0) if predictors.relu else z) @ w_out.T + bias >= 0


def test_planted_low_rank_gets_small_predictors_within_the_bounds(low_rank):
    predictors = read_predictors(low_rank[2])
    for i, (plan, figures) in enumerate(zip(predictors.plans, predictors.figures, strict=True)):
        assert figures.keys() == KEYS
        assert plan.mode == MODE_PREDICTOR
        assert (figures["layer"], figures["rank"], figures["always"]) == (i, plan.rank, plan.always)
        assert figures["recall"] >= 0.98
        assert figures["output_error"] <= 0.02
        assert figures["bytes_predictor"] < 0.97 * figures["bytes_gate"]
        assert [w.shape for w in predictors.weights(i)] == [
            (plan.rank, planted.N_EMBD), (planted.N_FF, plan.rank), (planted.N_FF,)
        ]  # fmt: skip


def test_reported_figures_hold_on_fresh_text(low_rank, tmp_path):
    fresh = profiled(open_checkpoint(low_rank[0]), tmp_path, seed=7)
    activations, predictors = read_activations(low_rank[1]), read_predictors(low_rank[2])
    for i, figures in enumerate(predictors.figures):
        computed = let_through(predictors, i, fresh.inputs(i).astype(np.float32))
        computed[:, activations.order(i)[: figures["always"]]] = True
        fired = fresh.active(i)
        assert computed[fired].mean() == pytest.approx(figures["recall"], abs=0.01)
        assert computed.mean() == pytest.approx(figures["predicted"], rel=0.1)


def test_weights_are_rounded_as_the_artifact_will_store_them(low_rank):
    import torch

    predictors = read_predictors(low_rank[2])
    assert predictors.quant == "q4_0"
    for i in range(len(predictors.plans)):
        for w in predictors.weights(i)[:2]:
            np.testing.assert_array_equal(rounded(torch.from_numpy(w), "q4_0").numpy(), w)


def test_digests_name_what_it_was_made_from(low_rank):
    activations, predictors = read_activations(low_rank[1]), read_predictors(low_rank[2])
    assert predictors.activations_digest == activations.digest
    assert predictors.checkpoint_digest == activations.checkpoint_digest == open_checkpoint(low_rank[0]).digest()


@pytest.mark.parametrize(
    ("n_embd", "bounds"), [(64, {}), (128, {"recall": 0.9999, "error": 1e-5})], ids=["too narrow", "bounds too tight"]
)
def test_gates_without_structure_stay_in_gate_mode(tmp_path, n_embd, bounds):
    checkpoint = open_checkpoint(tiny.make_llama(tmp_path / "model", n_embd=n_embd, n_ff=256))
    activations = profiled(checkpoint, tmp_path, seed=0)
    predictors = train(checkpoint, activations, tmp_path / "p", progress=silent, **bounds)
    assert [plan.mode for plan in predictors.plans] == [MODE_GATE, MODE_GATE]
    for figures in predictors.figures:
        assert figures["bytes_predictor"] > 0.97 * figures["bytes_gate"]
        assert figures["recall"] >= bounds.get("recall", 0.98)
        assert figures["output_error"] <= bounds.get("error", 0.02)
    with pytest.raises(PowerinferError, match="layer 1 runs in gate mode"):
        predictors.weights(1)


@pytest.mark.slow
def test_what_the_whole_model_does_not_bear_goes_back_to_gate_mode(low_rank, tmp_path):
    checkpoint, activations = open_checkpoint(low_rank[0]), read_activations(low_rank[1])
    kept = read_predictors(low_rank[2]).loss
    assert kept["dropped"] == []
    assert (kept["tokens"], kept["top1"] >= 0.98, kept["perplexity"] <= 0.005) == (
        activations.held_out().size,
        True,
        True,
    )
    assert kept["top1"] < 1
    strict = train(checkpoint, activations, tmp_path / "p", top1=1.0, perplexity=0.0, progress=silent)
    n_layer = activations.n_layer
    assert [plan.mode for plan in strict.plans] == [MODE_GATE] * n_layer
    assert [figures["mode"] for figures in strict.figures] == ["gate"] * n_layer
    assert (strict.loss["dropped"], strict.loss["top1"]) == (list(range(n_layer)), 1.0)
    with pytest.raises(PowerinferError, match="layer 0 runs in gate mode"):
        strict.weights(0)


def test_plain_ffn_is_predicted_by_its_up_rows(tmp_path):
    checkpoint = open_checkpoint(tiny.make_opt(tmp_path / "model"))
    activations = profiled(checkpoint, tmp_path, seed=0)
    predictors = train(checkpoint, activations, tmp_path / "p", recall=0.9, error=1.0, progress=silent)
    assert all(figures["recall"] >= 0.9 for figures in predictors.figures)


def test_silu_without_a_cut_is_refused(tmp_path):
    checkpoint = open_checkpoint(tiny.make_llama(tmp_path / "model", activation="silu"))
    with pytest.raises(PowerinferError, match=r"powerinfer profile .* --sparsity"):
        train(checkpoint, profiled(checkpoint, tmp_path, seed=0), tmp_path / "p", progress=silent)


@pytest.mark.slow
def test_cut_silu_is_predicted(tmp_path):
    folder = planted.set_activation(planted.make_low_rank(tmp_path / "model"), "silu")
    cut = profiled(open_checkpoint(folder), tmp_path, seed=1, sparsity=0.8)
    anything = {"top1": 0.0, "perplexity": 1e9}  # random weights have no answers to keep
    predictors = train(open_checkpoint(folder), cut, tmp_path / "p", **anything, progress=silent)
    assert predictors.plans[0].mode == MODE_PREDICTOR
    for figures in predictors.figures:
        assert figures["active"] == pytest.approx(0.2, abs=0.03)
        assert figures["recall"] >= 0.98


@pytest.mark.parametrize("bad", [{"recall": 0.0}, {"recall": 1.1}, {"error": -0.1}, {"quant": "q2_k"}])
def test_bad_arguments_are_refused_before_work(low_rank, tmp_path, bad):
    with pytest.raises(PowerinferError, match=f"^{next(iter(bad))}: expected") as error:
        train(open_checkpoint(low_rank[0]), read_activations(low_rank[1]), tmp_path / "p", **bad)
    assert error.value.kind == "usage"
    assert not list(tmp_path.iterdir())


def test_profile_of_another_checkpoint_is_refused(low_rank, tmp_path):
    other = open_checkpoint(tiny.make_llama(tmp_path / "model"))
    with pytest.raises(PowerinferError, match="another checkpoint"):
        train(other, read_activations(low_rank[1]), tmp_path / "p")


KILLED = """
import os, signal, sys
from pathlib import Path
from powerinfer_tools.activations import read_activations
from powerinfer_tools.checkpoint import open_checkpoint
from powerinfer_tools.predictors import train
def stop(what, done, total):
    if what == sys.argv[4]:
        os.kill(os.getpid(), signal.SIGKILL)
model, activations, output = map(Path, sys.argv[1:4])
train(open_checkpoint(model), read_activations(activations), output, progress=stop)
"""


@pytest.mark.slow
def test_killed_training_resumes_to_the_same_bytes(low_rank, tmp_path):
    output = tmp_path / "predictors"
    root = Path(__file__).parent.parent.parent
    for step, code in (("train, kinds tried", -9), ("train, layers", -9), ("never", 0)):
        argv = [sys.executable, "-c", KILLED, *map(str, (*low_rank[:2], output)), step]
        environment = os.environ | {"PYTHONPATH": str(root)}
        assert subprocess.run(argv, env=environment, check=False).returncode == code
        assert output.exists() == (code == 0)
    assert output.read_bytes() == low_rank[2].read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["predictors"]
