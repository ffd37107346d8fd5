"""Folder to tokens, for each family: profiled, split and decoded natively, the reference's greedy tokens come out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from powerinfer_tools.activations import profile, read_activations
from powerinfer_tools.artifact import open_artifact, split, verify
from powerinfer_tools.checkpoint import open_checkpoint
from powerinfer_tools.engine import Engine
from powerinfer_tools.progress import silent
from tests.artifacts import make_artifact
from tests.engine.test_engine import decode_all, greedy_tokens, ids, nmse, reference_logits
from tests.planted import write_text
from tests.tiny import make_llama
from tests.tiny_families import make_bamboo, make_bitnet, make_minicpm, make_nanochat
from tests.tiny_moe import make_mixtral, make_smallthinker
from tests.tiny_plain import make_arcee, make_falcon, make_nemotron

ODD = {"n_layer": 12, "n_embd": 120, "n_head": 6, "n_head_kv": 2, "n_vocab": 300}
FALCON = {"n_layer": 12, "n_embd": 120, "n_head": 6, "n_ff": 161}
FAMILIES: dict[str, Any] = {
    "relullama": lambda folder: make_llama(folder, n_ff=161, **ODD),
    "prosparse": lambda folder: make_llama(folder, n_ff=161, activation="fatrelu", **ODD),
    "arcee": lambda folder: make_arcee(folder, n_ff=161, **ODD),
    "nemotron": lambda folder: make_nemotron(folder, n_ff=161, **ODD),
    "falcon 7B": lambda folder: make_falcon(folder, **FALCON),
    "falcon 40B": lambda folder: make_falcon(
        folder, new_decoder_architecture=True, n_head_kv=2, norms=("ln_attn", "ln_mlp"), **FALCON
    ),
    "falcon, one after the other": lambda folder: make_falcon(
        folder, parallel_attn=False, norms=("input_layernorm", "post_attention_layernorm"), bias=True, **FALCON
    ),
    "bamboo": lambda folder: make_bamboo(folder, n_ff=161, **ODD),
    "turbosparse": lambda folder: make_bamboo(folder, n_ff=160, predictor=16, **ODD),
    "bitnet": lambda folder: make_bitnet(folder, n_ff=161, **ODD),
    "bitnet, master": lambda folder: make_bitnet(folder, n_ff=161, weights="master", **ODD),
    "bitnet, packed": lambda folder: make_bitnet(folder, n_ff=164, weights="packed", **ODD),
    "minicpm": lambda folder: make_minicpm(folder, n_ff=161, **ODD),
    "nanochat": lambda folder: make_nanochat(folder, n_ff=161, **ODD),
    "turbosparse-mixtral": lambda folder: make_mixtral(folder, n_ff=45, turbosparse=True, **ODD),
    "smallthinker": lambda folder: make_smallthinker(folder, still=(0, 4, 8), window=200, **ODD),
}


@pytest.fixture(params=FAMILIES, scope="module")
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model and its artifact."""
    folder = tmp_path_factory.mktemp("family")
    checkpoint = open_checkpoint(FAMILIES[request.param](folder / "model"))
    corpus = [write_text(folder / "corpus.txt", n_words=2000)]
    profile(checkpoint, corpus, folder / "a", n_tokens=512, n_samples=256, window=64, progress=silent)
    split(checkpoint, read_activations(folder / "a"), folder / "gate.gguf", quant="f32", progress=silent)
    return folder


def test_greedy_tokens_are_the_references(family: Path) -> None:
    prompt, checkpoint = ids(8), open_checkpoint(family / "model")
    found = greedy_tokens(family / "gate.gguf", prompt, 64)
    expected = reference_logits(checkpoint, prompt + found[:-1])[len(prompt) - 1 :]
    assert found == expected.argmax(-1).tolist()
    assert nmse(decode_all(family / "gate.gguf", prompt + found[:-1])[len(prompt) - 1 :], expected) <= 1e-6


def test_neurons_that_do_not_fire_are_skipped(family: Path) -> None:
    with Engine(family / "gate.gguf", mode="gate") as engine:
        rows = [engine.decode(token, logits=True) for token in ids(24)]
        assert 0.1 < engine.stats().active_ratio < 0.7
    assert np.array_equal(np.array(rows), decode_all(family / "gate.gguf", ids(24), mode="dense"))


def test_predictors_that_let_all_through_change_nothing(family: Path) -> None:
    make_artifact(family / "model", family / "predictor.gguf", predictor=True, slack=1e6)
    dense = decode_all(family / "gate.gguf", ids(24), mode="dense")
    assert nmse(decode_all(family / "predictor.gguf", ids(24)), dense) <= 1e-7  # its neurons lie in another order


def test_the_artifact_says_what_the_model_computes(family: Path) -> None:
    verify(family / "gate.gguf")
    found, expected = open_artifact(family / "gate.gguf").config, open_checkpoint(family / "model").config
    assert found.rope is not None
    assert expected.rope is not None
    np.testing.assert_array_equal(found.rope.inv_freq, expected.rope.inv_freq)
    expected = expected.with_thresholds(tuple(float(np.float32(t)) for t in expected.thresholds))
    assert vars(found) | {"rope": None} == vars(expected) | {"rope": None}
