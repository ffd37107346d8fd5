"""Mixtral against transformers, TurboSparse-Mixtral against its published definition, both from folders and GGUF."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from powerinfer_tools.checkpoint import Experts, open_checkpoint
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.reference import forward
from tests.checkpoint.test_huggingface import edit
from tests.families.definitions import Weights, decode
from tests.reference.test_transformers import assert_equal
from tests.tiny_moe import make_mixtral, make_moe_gguf

ODD = {"n_layer": 12, "n_embd": 120, "n_ff": 37, "n_head": 3, "n_head_kv": 1, "n_vocab": 317, "n_experts": 5}
TOKENS = torch.randint(300, (40,), generator=torch.Generator().manual_seed(1))


def test_mixtral_is_that_of_transformers(tmp_path: Path) -> None:
    assert_equal(make_mixtral(tmp_path, **ODD | {"n_ff": 36}))  # torch's grouped products take multiples of 4 only


@pytest.mark.parametrize("n_used", [1, 4])
def test_one_expert_and_all_of_them(tmp_path: Path, n_used: int) -> None:
    assert_equal(make_mixtral(tmp_path, n_used=n_used))


def test_what_transformers_writes_is_read(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_mixtral(tmp_path / "published")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "saved" / name).write_text((folder / name).read_text())
    saved, published = open_checkpoint(tmp_path / "saved"), open_checkpoint(folder)
    assert saved.config.experts == published.config.experts == Experts(4, 2, "softmax", "ffn_input")
    assert torch.equal(forward(saved, TOKENS[None]), forward(published, TOKENS[None]))


def moe(weights: Weights, base: str, x: Tensor, stream: Tensor) -> Tensor:
    """Mixtral of Experts (Jiang et al. 2024, section 2.1): softmax over the two largest logits; experts are dReLU
    (Song et al. 2024, arXiv 2406.05955, eq. 4)."""
    base = base.replace("mlp", "block_sparse_moe")
    found = torch.zeros_like(x)
    for p, token in enumerate(x):
        logits = weights[f"{base}.gate.weight"] @ token
        chosen = sorted(range(len(logits)), key=lambda e: -float(logits[e]))[:2]
        for share, e in zip(logits[chosen].exp() / logits[chosen].exp().sum(), chosen, strict=True):
            w1, w2, w3 = (weights[f"{base}.experts.{e}.w{part}.weight"] for part in (1, 2, 3))
            found[p] += share * (w2 @ ((w1 @ token).relu() * (w3 @ token).relu()))
    return found


def test_the_experts_own_predictors_are_left_out_and_that_is_said(tmp_path: Path) -> None:
    folder = make_mixtral(tmp_path, turbosparse=True, **ODD)
    expected = forward(open_checkpoint(folder), TOKENS[None])
    weights = load_file(folder / "model.safetensors")
    for part, shape in (("fc1", (8, 48)), ("fc2", (21, 8))):
        name = f"model.layers.0.block_sparse_moe.experts.0.predictor.{part}.weight"
        weights[name] = torch.ones(shape)
    save_file(weights, folder / "model.safetensors")
    found = open_checkpoint(folder)
    assert any("predictors are left out" in note for note in found.notes)
    assert torch.equal(forward(found, TOKENS[None]), expected)


def test_turbosparse_computes_what_is_published(tmp_path: Path) -> None:
    folder = make_mixtral(tmp_path, turbosparse=True, **ODD)
    expected = decode(folder, TOKENS, moe)
    assert expected.std() > 0.3
    checkpoint = open_checkpoint(folder)
    assert (forward(checkpoint, TOKENS[None])[0] - expected).abs().max() <= 1e-4
    assert (checkpoint.config.arch, checkpoint.config.activation, checkpoint.config.n_ff) == ("mixtral", "drelu", 185)


@pytest.mark.parametrize("packed", [True, False])
def test_gguf_is_the_same_model(tmp_path: Path, packed: bool) -> None:
    folder = make_mixtral(tmp_path / "hf", turbosparse=True)
    found = open_checkpoint(make_moe_gguf(tmp_path / "m.gguf", folder, packed=packed), "drelu")
    expected = open_checkpoint(folder)
    assert found.config.arch == "mixtral"
    assert found.config.experts == expected.config.experts
    for name in expected.names():
        assert (found.read(name) == expected.read(name)).all(), name
    assert (found.read("blk.1.ffn_gate.weight", slice(35, 90)) == expected.read("blk.1.ffn_gate.weight")[35:90]).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts_per_tok": 5}, "num_experts_per_tok: expected an integer in 1..4, found 5"),
        ({"num_local_experts": None}, "num_local_experts: expected an integer in 1..512, found nothing"),
        ({"num_local_experts": 3}, r"gate.weight: expected \[3, 64\], found \[4, 64\]"),
        ({"hidden_act": "gelu"}, "hidden_act: expected one of relu"),
    ],
)
def test_refuses_what_does_not_go_together(tmp_path: Path, fields: dict[str, object], message: str) -> None:
    folder = make_mixtral(tmp_path)
    edit(folder / "config.json", **fields)
    with pytest.raises(PowerinferError, match=message):
        open_checkpoint(folder)


def test_the_window_of_attention_limits_the_context(tmp_path: Path) -> None:
    folder = make_mixtral(tmp_path)
    assert open_checkpoint(folder).config.n_ctx == 256
    edit(folder / "config.json", sliding_window=100)
    assert open_checkpoint(folder).config.n_ctx == 100
