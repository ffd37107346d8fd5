"""nanochat against transformers, and what is folded into its weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from powerinfer_tools.checkpoint import open_checkpoint
from powerinfer_tools.errors import PowerinferError
from tests.checkpoint.test_huggingface import edit
from tests.reference.test_transformers import assert_equal
from tests.tiny_families import make_nanochat

SHAPES: dict[str, dict[str, Any]] = {
    "deep": {"n_layer": 12},
    "odd": {"n_layer": 12, "n_embd": 120, "n_ff": 161, "n_head": 6, "n_head_kv": 2, "n_vocab": 317},
    "biases": {"bias": True},
}


@pytest.mark.parametrize("name", SHAPES)
def test_computes_what_transformers_computes(tmp_path: Path, name: str) -> None:
    assert_equal(make_nanochat(tmp_path, **SHAPES[name]))


def test_without_a_cap(tmp_path: Path) -> None:
    folder = make_nanochat(tmp_path)
    capped = open_checkpoint(folder).config.softcap
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"final_logit_softcapping": None}))
    assert (capped, open_checkpoint(folder).config.softcap) == (15.0, 0.0)
    assert_equal(folder)


def test_config(tmp_path: Path) -> None:
    config = open_checkpoint(make_nanochat(tmp_path)).config
    assert (config.arch, config.activation, config.gated, config.tied) == ("nanochat", "relu2", False, False)
    assert (config.qk_norm, config.softcap, config.norm, config.learned_positions) == (True, 15.0, "rms", False)
    assert config.rope is not None
    assert config.rope.inv_freq[0] == -1.0  # it turns the other way


def test_embedding_is_read_normalised_and_norms_are_ones(tmp_path: Path) -> None:
    folder = make_nanochat(tmp_path)
    checkpoint = open_checkpoint(folder)
    stored = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].astype(np.float64)
    expected = stored / np.sqrt((stored**2).mean(axis=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(checkpoint.read("token_embd.weight"), expected, rtol=3e-7)
    rows = checkpoint.read("token_embd.weight", slice(7, 11))
    np.testing.assert_array_equal(rows, checkpoint.read("token_embd.weight")[7:11])
    for name in ("output_norm.weight", "blk.0.attn_norm.weight", "blk.1.ffn_norm.weight"):
        np.testing.assert_array_equal(checkpoint.read(name), np.ones(64, np.float32))
    assert checkpoint.read("output_norm.weight", slice(3, 9)).shape == (6,)


def test_refuses_what_it_does_not_compute(tmp_path: Path) -> None:
    folder = make_nanochat(tmp_path)
    edit(folder / "config.json", tie_word_embeddings=True)
    with pytest.raises(PowerinferError, match="tie_word_embeddings: expected false"):
        open_checkpoint(folder)
    edit(folder / "config.json", tie_word_embeddings=False, hidden_act="gelu")
    with pytest.raises(PowerinferError, match=r"hidden_act: expected .*, found 'gelu'"):
        open_checkpoint(folder)
