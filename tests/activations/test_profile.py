"""Profiles against an independent count, planted patterns, thresholds and interruptions."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from powerinfer_tools import reference
from powerinfer_tools.activations import apply, profile, read_activations
from powerinfer_tools.activations.corpus import calibration_windows
from powerinfer_tools.checkpoint import open_checkpoint
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.progress import silent
from tests import planted, tiny
from tests.drawn import DrawnCheckpoint, drawn_config

SMALL = {"n_tokens": 640, "window": 64, "n_samples": 100, "progress": silent}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted.write_text(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.mark.parametrize("make", [tiny.make_llama, tiny.make_opt])
def test_counts_equal_those_of_transformers(tmp_path, text, make):
    from transformers import AutoModelForCausalLM

    checkpoint = open_checkpoint(make(tmp_path / "model", n_layer=3))
    activations = profile(checkpoint, [text], tmp_path / "a", **SMALL)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    layers = model.model.layers if make is tiny.make_llama else model.model.decoder.layers
    fired = []
    for layer in layers:
        last = layer.mlp.down_proj if make is tiny.make_llama else layer.fc2
        last.register_forward_pre_hook(lambda _, x: fired.append((x[0] != 0).reshape(-1, x[0].shape[-1])))
    tokens = calibration_windows(checkpoint, [text], SMALL["n_tokens"], SMALL["window"])
    with torch.no_grad():
        model(torch.from_numpy(tokens))
    assert activations.n_tokens == tokens.size == 640
    for i in range(3):
        expected = fired[i].sum(0).numpy()
        # a pre-activation within rounding of zero may fall to either side
        assert np.abs(activations.counts(i) - expected).sum() <= 1e-4 * expected.sum()


@pytest.mark.parametrize("structure", [{}, {"parallel": True, "sub_norms": True}])
def test_sample_is_of_the_same_tokens_in_every_layer_and_tells_who_fired(tmp_path, text, structure):
    checkpoint = DrawnCheckpoint(drawn_config(**structure))
    activations = profile(checkpoint, [text], tmp_path / "a", **SMALL)
    tokens = torch.from_numpy(calibration_windows(checkpoint, [text], 640, 64))
    hidden = reference.embed(checkpoint, tokens)
    positions = activations.positions()
    assert len(np.unique(positions)) == 100
    for i in range(2):
        layer = reference.load_layer(checkpoint, i)
        x = layer.attention(hidden)[1].flatten(0, 1)[positions]
        np.testing.assert_allclose(activations.inputs(i), x.numpy(), atol=0.01)
        assert (activations.active(i) == (layer.ffn.neurons(x) != 0).numpy()).mean() > 0.9999
        hidden = layer(hidden)


def test_whole_sample_counts_as_the_counts_do(tmp_path, text):
    checkpoint = open_checkpoint(tiny.make_llama(tmp_path / "model"))
    activations = profile(checkpoint, [text], tmp_path / "a", **SMALL | {"n_samples": 10_000})
    assert activations.n_samples == activations.n_tokens
    for i in range(2):
        np.testing.assert_array_equal(activations.active(i).sum(0), activations.counts(i))
        order = activations.order(i)
        assert (np.diff(activations.counts(i)[order]) <= 0).all()
        assert sorted(order) == list(range(activations.n_ff))


def test_every_layer_keeps_its_own_pattern(tmp_path, text):
    folder, pattern = planted.make_patterned(tmp_path / "model")
    activations = profile(open_checkpoint(folder), [text], tmp_path / "a", **SMALL)
    for i in range(12):
        np.testing.assert_array_equal(activations.frequency(i), pattern[i].astype(float))
        np.testing.assert_array_equal(activations.active(i), np.tile(pattern[i], (100, 1)))


@pytest.mark.parametrize("sparsity", [0.3, 0.7])
def test_thresholds_hit_the_sparsity(tmp_path, text, sparsity):
    checkpoint = open_checkpoint(tiny.make_llama(tmp_path / "model", n_layer=3, activation="silu"))
    before = checkpoint.config
    activations = profile(checkpoint, [text], tmp_path / "a", sparsity=sparsity, **SMALL)
    assert checkpoint.config == before
    for i in range(3):
        assert activations.thresholds[i] > 0
        assert activations.frequency(i).mean() == pytest.approx(1 - sparsity, abs=0.01)
    apply(activations, checkpoint)
    assert checkpoint.config.thresholds == activations.thresholds
    assert checkpoint.config.exactly_sparse


def test_silu_without_sparsity_fires_always_and_is_not_cut(tmp_path, text):
    checkpoint = open_checkpoint(tiny.make_llama(tmp_path / "model", activation="silu"))
    activations = profile(checkpoint, [text], tmp_path / "a", **SMALL)
    assert activations.thresholds == (0.0, 0.0)
    assert activations.frequency(0).min() == 1.0


def test_sparsity_is_refused_where_zeros_are_exact(tmp_path, text):
    checkpoint = open_checkpoint(tiny.make_llama(tmp_path / "model"))
    with pytest.raises(PowerinferError, match="relu gives exact zeros") as error:
        profile(checkpoint, [text], tmp_path / "a", sparsity=0.5, **SMALL)
    assert error.value.kind == "usage"


def test_another_checkpoint_is_refused(tmp_path, text):
    activations = profile(open_checkpoint(tiny.make_llama(tmp_path / "model")), [text], tmp_path / "a", **SMALL)
    other = open_checkpoint(tiny.make_llama(tmp_path / "other", seed=1))
    with pytest.raises(PowerinferError, match="another checkpoint") as error:
        apply(activations, other)
    assert activations.checkpoint_digest[:12] in str(error.value)
    assert other.digest()[:12] in str(error.value)


def test_output_is_kept_without_force(tmp_path, text):
    checkpoint = open_checkpoint(tiny.make_llama(tmp_path / "model"))
    (tmp_path / "a").write_text("precious")
    with pytest.raises(PowerinferError, match="--force"):
        profile(checkpoint, [text], tmp_path / "a", **SMALL)
    assert (tmp_path / "a").read_text() == "precious"
    profile(checkpoint, [text], tmp_path / "a", force=True, **SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "model"]


KILLED = """
import os, signal, sys
from pathlib import Path
from powerinfer_tools.activations import profile
from powerinfer_tools.checkpoint import open_checkpoint
left = int(sys.argv[4])
def replace(source, target, original=os.replace):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    original(source, target)
os.replace = replace
model, text, output = map(Path, sys.argv[1:4])
profile(open_checkpoint(model), [text], output, n_tokens=640, window=64, n_samples=100, progress=lambda *_: None)
"""


@pytest.mark.slow
def test_killed_profile_resumes_to_the_same_bytes(tmp_path, text):
    """Life k is killed before its k-th piece becomes whole; the last one finishes."""
    model = tiny.make_llama(tmp_path / "model", n_layer=2)
    whole = tmp_path / "whole"
    profile(open_checkpoint(model), [text], whole, **SMALL)
    root = Path(__file__).parent.parent.parent
    output, codes = tmp_path / "killed", []
    for life in range(9):
        argv = [sys.executable, "-c", KILLED, str(model), str(text), str(output), str(life)]
        codes.append(subprocess.run(argv, env=os.environ | {"PYTHONPATH": str(root)}, check=False).returncode)
        if codes[-1] == 0:
            break
        assert not output.exists()
    assert codes[-1] == 0
    assert codes[:-1] == [-9] * len(codes[:-1])
    assert len(codes) > 3
    assert output.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "model", "whole"]


def test_unfinished_work_of_another_run_is_named(tmp_path, text):
    checkpoint = open_checkpoint(tiny.make_llama(tmp_path / "model"))

    def stop(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profile(checkpoint, [text], tmp_path / "a", **SMALL | {"progress": stop})
    with pytest.raises(PowerinferError, match="another samples, seed"):
        profile(checkpoint, [text], tmp_path / "a", **SMALL | {"n_samples": 50}, seed=1)
    done = []
    profile(checkpoint, [text], tmp_path / "a", **SMALL | {"progress": lambda *step: done.append(step)})
    fresh = profile(checkpoint, [text], tmp_path / "b", **SMALL)
    assert read_activations(tmp_path / "a").digest == fresh.digest


def test_two_runs_do_not_write_one_output(tmp_path, text):
    checkpoint = open_checkpoint(tiny.make_llama(tmp_path / "model"))

    def again(what: str, done: int, total: int) -> None:
        with pytest.raises(PowerinferError, match="is writing it"):
            profile(checkpoint, [text], tmp_path / "a", **SMALL)

    profile(checkpoint, [text], tmp_path / "a", **SMALL | {"progress": again})
