"""Bamboo and TurboSparse-Mistral against their published definition: PowerInfer/Bamboo-base-v0_1, BambooMLP.forward.

A Mistral whose FFN is down(relu(gate x) * relu(up x)), the dReLU of TurboSparse (Song et al. 2024, arXiv 2406.05955,
eq. 4). PowerInfer/TurboSparse-Mistral-Instruct has the same config.json and a predictor beside each FFN.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from powerinfer_tools.checkpoint import open_checkpoint
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.reference import forward
from tests.checkpoint.test_huggingface import edit
from tests.families.definitions import Weights, decode
from tests.tiny_families import make_bamboo
from tests.tiny_gguf import make_gguf

ODD = {"n_layer": 12, "n_embd": 120, "n_ff": 168, "n_head": 3, "n_head_kv": 1, "n_vocab": 317}
TOKENS = torch.randint(300, (40,), generator=torch.Generator().manual_seed(1))


def drelu(weights: Weights, base: str, x: Tensor, stream: Tensor) -> Tensor:
    gate, up = (x @ weights[f"{base}.{part}_proj.weight"].T for part in ("gate", "up"))
    return gate.relu() * up.relu() @ weights[f"{base}.down_proj.weight"].T


def foreseen(weights: Weights, base: str, x: Tensor, stream: Tensor) -> Tensor:
    """As TurboSparse-Mistral-Instruct's own modeling_bamboo.py: only neurons whose predictor rounds to 1 take part."""
    fc1, fc2 = (weights[f"{base}.predictor.fc{part}.weight"] for part in (1, 2))
    passed = ((stream @ fc1.T).relu() @ fc2.T).sigmoid().round()
    gate, up = (x @ weights[f"{base}.{part}_proj.weight"].T for part in ("gate", "up"))
    return passed * gate.relu() * up.relu() @ weights[f"{base}.down_proj.weight"].T


@pytest.mark.parametrize("predictor", [0, 16])
def test_computes_what_is_published(tmp_path: Path, predictor: int) -> None:
    folder = make_bamboo(tmp_path, predictor=predictor, **ODD)
    expected = decode(folder, TOKENS, drelu)
    assert expected.std() > 0.3
    found = forward(open_checkpoint(folder), TOKENS[None])[0]
    assert (found - expected).abs().max() <= 1e-4
    if predictor:  # it would matter
        assert (found - decode(folder, TOKENS, foreseen)).abs().max() > 0.1


def test_config(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_bamboo(tmp_path))
    config = checkpoint.config
    assert (config.arch, config.activation, config.gated, config.n_ctx) == ("bamboo", "drelu", True, 128)
    assert any("sliding window" in note for note in checkpoint.notes)
    assert not any("predictor" in note for note in checkpoint.notes)


def test_gguf_is_the_same_model(tmp_path: Path) -> None:
    folder = make_bamboo(tmp_path / "hf")
    found = open_checkpoint(make_gguf(tmp_path / "m.gguf", folder, arch="bamboo"))
    assert (found.config.arch, found.config.activation) == ("bamboo", "drelu")
    assert torch.equal(forward(found, TOKENS[None]), forward(open_checkpoint(folder), TOKENS[None]))
    assert not found.notes


def test_predictors_are_read_and_it_says_so(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_bamboo(tmp_path, predictor=16))
    assert any("mlp.predictor" in note for note in checkpoint.notes)
    assert checkpoint.predictors is not None
    assert set(checkpoint.predictors.ranks) == {16}


def test_refuses_what_is_not_drelu(tmp_path: Path) -> None:
    folder = make_bamboo(tmp_path)
    edit(folder / "config.json", hidden_act="silu")
    with pytest.raises(PowerinferError, match="hidden_act: expected one of relu, drelu, found 'silu'"):
        open_checkpoint(folder)
