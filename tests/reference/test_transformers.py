"""The reference computes what transformers computes, in float32, for random models of every family and variant."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from powerinfer_tools.checkpoint import open_checkpoint
from powerinfer_tools.reference import forward
from tests.tiny import make_llama, make_opt

TOLERANCE = 1e-4  # greatest difference of a logit

ODD = {"n_embd": 120, "n_ff": 168, "n_head": 3, "n_head_kv": 1, "n_vocab": 317}

LLAMAS: dict[str, dict[str, Any]] = {
    "deep": {"n_layer": 12},
    "head_dim 40, 3:1, tied": {**ODD, "n_layer": 12, "tied": True},
    "head_dim apart from n_embd": {"n_embd": 96, "n_head": 6, "n_head_kv": 2, "head_dim": 40, "n_ff": 161},
    "biases": {**ODD, "bias": True},
    "silu": {"activation": "silu"},
    "relu2": {"activation": "relu2", "bias": True},
    "mistral": {"model_type": "mistral", "activation": "silu"},
    "qwen2": {"model_type": "qwen2", "activation": "silu", "tied": True},
    "sharded": {"shards": 3, "n_layer": 3},
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "old spelling": {"type": "linear", "factor": 3.0},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn, every number": {
        "rope_type": "yarn",
        "factor": 3.0,
        "original_max_position_embeddings": 80,
        "beta_fast": 8.0,
        "beta_slow": 0.5,
        "mscale": 0.8,
        "mscale_all_dim": 0.4,
        "truncate": False,
    },
    "yarn, attention factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.3,
    },
}
OPTS: dict[str, dict[str, Any]] = {
    "deep": {"n_layer": 12},
    "odd": {"n_embd": 120, "n_head": 3, "n_ff": 161, "n_vocab": 311},
    "no biases, untied": {"bias": False, "tied": False},
    "sharded": {"shards": 2},
}


def assert_equal(folder: Path, n_tokens: int = 70) -> None:
    """70 tokens reach beyond the original context of 64 in the scaled variants above."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    checkpoint = open_checkpoint(folder)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(checkpoint.config.n_vocab, (2, n_tokens), generator=generator)
    with torch.no_grad():
        expected = model(tokens).logits
    difference = (forward(checkpoint, tokens) - expected).abs().max()
    assert expected.std() > 0.3  # a model whose logits are all alike would prove nothing
    assert difference <= TOLERANCE


@pytest.mark.parametrize("name", LLAMAS)
def test_llama(tmp_path: Path, name: str) -> None:
    assert_equal(make_llama(tmp_path, **LLAMAS[name]))


@pytest.mark.parametrize("name", OPTS)
def test_opt(tmp_path: Path, name: str) -> None:
    assert_equal(make_opt(tmp_path, **OPTS[name]))


@pytest.mark.parametrize("name", ROPES)
def test_rope(tmp_path: Path, name: str) -> None:
    assert_equal(make_llama(tmp_path, head_dim=40, rope_scaling=ROPES[name]), n_tokens=200)


def test_rope_parameters_spelling(tmp_path: Path) -> None:
    """transformers 5 writes rope_theta into rope_parameters."""
    folder = make_llama(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["rope_theta"], config["rope_scaling"]
    config["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    (folder / "config.json").write_text(json.dumps(config))
    assert_equal(folder)
