"""SmallThinker against its published definition: PowerInfer/SmallThinker-4BA0.6B-Instruct, modeling_smallthinker.py.

SmallThinkerDecoderLayer hands SmallThinkerMoeBlock the stream before attention as the router's input, which chooses
the experts of the largest logits and weighs them by a softmax over these, or by their sigmoids made to sum to 1; an
expert is down(up(x) * relu(gate(x))). rope_layout says which layers rotate. llama.cpp's graph is the same.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from powerinfer_tools.checkpoint import Experts, open_checkpoint
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.reference import forward
from tests.checkpoint.test_huggingface import edit
from tests.families.definitions import Weights, attend, normalise
from tests.tiny_families import read_config
from tests.tiny_moe import make_moe_gguf, make_smallthinker

ODD = {"n_layer": 12, "n_embd": 120, "n_ff": 37, "n_head": 3, "n_head_kv": 1, "n_vocab": 317, "n_experts": 7}
MODELS: dict[str, dict[str, Any]] = {
    "4B": {**ODD, "n_used": 4},
    "21B": {**ODD, "still": (0, 4, 8), "window": 64, "tied": False},
    "softmax": {"softmax": True, "head_dim": 24},
    "one expert chosen": {"n_used": 1},
    "no layer rotates": {"still": (0, 1)},
}
TOKENS = torch.randint(300, (40,), generator=torch.Generator().manual_seed(1))


def definition(folder: Path, tokens: Tensor) -> Tensor:
    config, weights = read_config(folder), load_file(folder / "model.safetensors")
    eps, embed = config["rms_norm_eps"], weights["model.embed_tokens.weight"]
    stream = embed[tokens]
    for i, rotates in enumerate(config["rope_layout"]):
        layer, before = f"model.layers.{i}", stream
        x = normalise(stream, weights[f"{layer}.input_layernorm.weight"], eps)
        stream = stream + attend(weights, f"{layer}.self_attn", x, config["num_attention_heads"], bool(rotates))
        x = normalise(stream, weights[f"{layer}.post_attention_layernorm.weight"], eps)
        added = [moe(config, weights, f"{layer}.block_sparse_moe", *token) for token in zip(before, x, strict=True)]
        stream = stream + torch.stack(added)
    x = normalise(stream, weights["model.norm.weight"], eps)
    return x @ weights.get("lm_head.weight", embed).T


def moe(config: dict[str, Any], weights: Weights, base: str, before: Tensor, x: Tensor) -> Tensor:
    logits = weights[f"{base}.primary_router.weight"] @ before
    chosen = sorted(range(len(logits)), key=lambda e: -float(logits[e]))[: config["moe_num_active_primary_experts"]]
    shares = logits[chosen].exp() if config["moe_primary_router_apply_softmax"] else 1 / (1 + (-logits[chosen]).exp())
    found = torch.zeros_like(x)
    for share, e in zip(shares / shares.sum(), chosen, strict=True):
        gate, up, down = (weights[f"{base}.experts.{e}.{part}.weight"] for part in ("gate", "up", "down"))
        found += share * (down @ ((up @ x) * (gate @ x).relu()))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_computes_what_is_published(tmp_path: Path, name: str) -> None:
    folder = make_smallthinker(tmp_path, **MODELS[name])
    expected = definition(folder, TOKENS)
    assert expected.std() > 0.3
    assert (forward(open_checkpoint(folder), TOKENS[None])[0] - expected).abs().max() <= 1e-4


def test_config(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_smallthinker(tmp_path, **MODELS["21B"]))
    config = checkpoint.config
    assert (config.arch, config.activation, config.gated, config.n_ff) == ("smallthinker", "relu", True, 259)
    assert config.experts == Experts(7, 3, "sigmoid", "layer_input")
    assert config.rotary == tuple(i % 4 != 0 for i in range(12))
    assert config.n_ctx == 64
    assert any("sliding window" in note for note in checkpoint.notes)


@pytest.mark.parametrize("name", ["4B", "21B", "softmax"])
def test_gguf_is_the_same_model(tmp_path: Path, name: str) -> None:
    folder = make_smallthinker(tmp_path / "hf", **MODELS[name])
    found, expected = open_checkpoint(make_moe_gguf(tmp_path / "m.gguf", folder)), open_checkpoint(folder)
    for field in ("arch", "activation", "n_ff", "n_ctx", "experts", "rotary", "tied"):
        assert getattr(found.config, field) == getattr(expected.config, field)
    assert torch.equal(forward(found, TOKENS[None]), forward(expected, TOKENS[None]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_layout": [1]}, r"rope_layout: expected 2 times 0 or 1, found \[1\]"),
        ({"sliding_window_layout": [0, 2]}, r"sliding_window_layout: expected 2 times 0 or 1"),
        ({"moe_ffn_hidden_size": None}, "moe_ffn_hidden_size: expected an integer"),
        ({"moe_num_active_primary_experts": 7}, "moe_num_active_primary_experts: expected an integer in 1..6, found 7"),
    ],
)
def test_refuses_what_does_not_go_together(tmp_path: Path, fields: dict[str, object], message: str) -> None:
    folder = make_smallthinker(tmp_path)
    edit(folder / "config.json", **fields)
    with pytest.raises(PowerinferError, match=message):
        open_checkpoint(folder)


def test_gguf_refuses_other_gatings(tmp_path: Path) -> None:
    folder = make_smallthinker(tmp_path / "hf")
    path = make_moe_gguf(tmp_path / "m.gguf", folder, keys={"smallthinker.expert_gating_func": 3})
    with pytest.raises(PowerinferError, match="expert_gating_func: expected 1, softmax, or 2, sigmoid, found 3"):
        open_checkpoint(path)
