"""Activations against their definitions, neuron by neuron; transformers lacks fatrelu, drelu and the cut."""

import json
import math
from pathlib import Path

import pytest
import torch

from powerinfer_tools.checkpoint import open_checkpoint
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.reference import Ffn, embed, forward, load_ffn, load_layer, logits
from powerinfer_tools.reference.ffn import activate
from tests.tiny import make_llama, make_opt


def silu(g: float) -> float:
    return g / (1 + math.exp(-g))


DEFINITIONS = {
    "relu": lambda g, u: max(g, 0.0) * u,
    "relu2": lambda g, u: max(g, 0.0) ** 2 * u,
    "fatrelu": lambda g, u: (g if g > 0.05 else 0.0) * u,
    "drelu": lambda g, u: max(g, 0.0) * max(u, 0.0),
    "silu": lambda g, u: silu(g) * u,
}


@pytest.mark.parametrize("activation", DEFINITIONS)
def test_neurons(tmp_path: Path, activation: str) -> None:
    ffn = load_ffn(open_checkpoint(make_llama(tmp_path, activation=activation, bias=True)), 1)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    assert ffn.gate is not None
    gate = x @ ffn.gate.T + ffn.gate_bias
    up = x @ ffn.up.T + ffn.up_bias
    define = DEFINITIONS[activation]
    pairs = zip(gate.flatten().tolist(), up.flatten().tolist(), strict=True)
    expected = torch.tensor([define(g, u) for g, u in pairs]).reshape(3, 160)
    torch.testing.assert_close(ffn.select(x), gate)
    torch.testing.assert_close(ffn.neurons(x), expected)
    assert torch.equal(ffn.neurons(x) != 0, expected != 0)
    torch.testing.assert_close(ffn(x), expected @ ffn.down.T + ffn.down_bias)


def test_cut_activation(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_llama(tmp_path, activation="silu"))
    checkpoint.config = checkpoint.config.with_thresholds((0.0, 0.2))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    uncut, cut = load_ffn(checkpoint, 0), load_ffn(checkpoint, 1)
    assert (uncut.neurons(x) != 0).all()
    fires = torch.nn.functional.silu(cut.select(x)).abs() >= 0.2
    assert 0.1 < fires.float().mean() < 0.9
    assert torch.equal(cut.neurons(x) != 0, fires)


def test_threshold_itself_fires_when_cut_and_not_when_fat() -> None:
    g = torch.tensor([0.25, 0.5])
    assert activate(g, "fatrelu", 0.5).tolist() == [0.0, 0.0]
    assert activate(g, "relu", 0.5).tolist() == [0.0, 0.5]


def test_plain_ffn_selects_by_up(tmp_path: Path) -> None:
    ffn = load_ffn(open_checkpoint(make_opt(tmp_path)), 0)
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    assert ffn.gate is None
    torch.testing.assert_close(ffn.select(x), x @ ffn.up.T + ffn.up_bias)
    assert torch.equal(ffn.neurons(x), ffn.select(x).clamp(min=0))


@pytest.mark.parametrize("activation", ["drelu", "fatrelu"])
def test_whole_model(tmp_path: Path, activation: str) -> None:
    """A transformers model whose MLP is replaced by the definition."""
    from transformers import AutoModelForCausalLM

    folder = make_llama(tmp_path, activation=activation, n_layer=12)
    checkpoint = open_checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for layer in model.model.layers:
        mlp = layer.mlp
        if activation == "fatrelu":
            mlp.act_fn = torch.nn.Threshold(0.05, 0.0)
        else:
            mlp.up_proj = torch.nn.Sequential(mlp.up_proj, torch.nn.ReLU())
    tokens = torch.arange(60).reshape(2, 30)
    with torch.no_grad():
        expected = model(tokens).logits
    assert (forward(checkpoint, tokens) - expected).abs().max() <= 1e-4


def test_steps_make_the_whole(tmp_path: Path) -> None:
    """The pieces that profile calls, one by one, and a batch against its rows."""
    checkpoint = open_checkpoint(make_llama(tmp_path, n_head=6, n_embd=96))
    tokens = torch.arange(24).reshape(3, 8)
    hidden = embed(checkpoint, tokens)
    for i in range(checkpoint.config.n_layer):
        layer = load_layer(checkpoint, i)
        after, x = layer.attention(hidden)
        hidden = after + layer.ffn.output(layer.ffn.neurons(x))
    expected = forward(checkpoint, tokens)
    torch.testing.assert_close(logits(checkpoint, hidden), expected)
    torch.testing.assert_close(forward(checkpoint, tokens[1:2]), expected[1:2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(forward(checkpoint, tokens[:, :5]), expected[:, :5], atol=1e-5, rtol=1e-5)


def test_refuses_what_it_has_no_rows_for(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_llama(tmp_path, n_ctx=16))
    with pytest.raises(PowerinferError, match="at most 16 positions, found 17"):
        forward(checkpoint, torch.zeros(1, 17, dtype=torch.int64))
    with pytest.raises(PowerinferError, match="token ids below 300"):
        forward(checkpoint, torch.tensor([[300]]))


def test_refuses_weights_that_are_not_finite(tmp_path: Path) -> None:
    """Named at the first pass over the model, not after hours."""
    from safetensors.numpy import load_file, save_file

    folder = make_llama(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][7, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        PowerinferError, match=r"blk\.1\.ffn_up\.weight: expected finite weights, found nan at \[7, 3\]"
    ):
        forward(open_checkpoint(folder), torch.tensor([[1, 2]]))


def test_ffn_is_a_plain_record() -> None:
    """Other stages build one from their own tensors."""
    eye = torch.eye(2)
    ffn = Ffn("relu", 0.0, gate=eye, up=eye, down=eye, gate_bias=None, up_bias=None, down_bias=None)
    assert ffn(torch.tensor([2.0, -3.0])).tolist() == [4.0, 0.0]
