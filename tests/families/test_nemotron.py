"""Nemotron against transformers: norms around 0, and only part of each head rotates."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from powerinfer_tools.checkpoint import open_checkpoint
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.reference import forward
from tests.checkpoint.test_huggingface import edit
from tests.reference.test_transformers import assert_equal
from tests.tiny_families import read_config, rewrite
from tests.tiny_gguf import make_gguf
from tests.tiny_plain import make_nemotron

ODD = {"n_layer": 12, "n_embd": 120, "n_ff": 161, "n_head": 3, "n_head_kv": 1, "n_vocab": 317}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SHAPES: dict[str, dict[str, Any]] = {
    "deep, odd": ODD,
    "head_dim apart, 0.3 of it rotates": {"n_embd": 96, "n_head": 6, "n_head_kv": 2, "head_dim": 40, "share": 0.3},
    "share not said": {"share": None, "n_layer": 12},
    "all rotates, biases, tied": {"share": 1.0, "bias": True, "tied": True},
    "scaled positions": {"rope_scaling": LLAMA3},
}


@pytest.mark.parametrize("name", SHAPES)
def test_computes_what_transformers_computes(tmp_path: Path, name: str) -> None:
    assert_equal(make_nemotron(tmp_path, **SHAPES[name]))


def test_share_in_rope_parameters(tmp_path: Path) -> None:
    """transformers 5 writes it there."""
    folder = make_nemotron(tmp_path)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
    edit(folder / "config.json", rope_parameters=rope, partial_rotary_factor=None, rope_theta=None)
    rope_read = open_checkpoint(folder).config.rope
    assert rope_read is not None
    assert rope_read.inv_freq.shape == (6,)
    assert_equal(folder)


def test_config_and_norms(tmp_path: Path) -> None:
    folder = make_nemotron(tmp_path, **ODD)
    checkpoint = open_checkpoint(folder)
    config = checkpoint.config
    assert (config.arch, config.norm, config.activation, config.gated) == ("nemotron", "layer", "relu2", False)
    assert config.rope is not None
    assert config.rope.inv_freq.shape == (10,)
    stored = load_file(folder / "model.safetensors")["model.layers.11.input_layernorm.weight"]
    np.testing.assert_array_equal(checkpoint.read("blk.11.attn_norm.weight"), stored + 1)
    np.testing.assert_array_equal(checkpoint.read("blk.11.attn_norm.weight", slice(7, 9)), stored[7:9] + 1)


def test_gguf_is_the_same_model(tmp_path: Path) -> None:
    """llama.cpp writes norms around 1, and their epsilon twice."""
    folder, shifted = make_nemotron(tmp_path / "hf", **ODD), make_nemotron(tmp_path / "shifted", **ODD)
    tensors = load_file(folder / "model.safetensors")
    rewrite(shifted, read_config(folder), {n: t + 1 if n.endswith("norm.weight") else t for n, t in tensors.items()})
    keys = {"rope.dimension_count": 20, "rope.scaling.type": "none"}
    keys |= {"attention.layer_norm_epsilon": 1e-5, "attention.layer_norm_rms_epsilon": 1e-5}
    keys = {f"nemotron.{key}": value for key, value in keys.items()}
    path = make_gguf(tmp_path / "m.gguf", shifted, arch="nemotron", permuted=False, keys=keys)
    assert_same_model(path, folder)


def assert_same_model(path: Path, folder: Path, activation: str | None = None) -> None:
    """The GGUF file has the folder's config, tensors and logits."""
    ours, theirs = open_checkpoint(path, activation), open_checkpoint(folder)
    assert ours.names() == theirs.names()
    for name in ours.names():
        np.testing.assert_array_equal(ours.read(name), theirs.read(name))
    assert (ours.config.arch, ours.config.activation) == (theirs.config.arch, theirs.config.activation)
    assert not ours.notes
    tokens = torch.arange(60)[None]
    assert torch.equal(forward(ours, tokens), forward(theirs, tokens))


def test_refuses_what_it_does_not_compute(tmp_path: Path) -> None:
    folder = make_nemotron(tmp_path)
    edit(folder / "config.json", partial_rotary_factor=0.07)
    with pytest.raises(PowerinferError, match="partial_rotary_factor: expected a share of 16 that is an even number"):
        open_checkpoint(folder)
