"""MiniCPM-S against its published definition: openbmb/MiniCPM-S-1B-sft, modeling_minicpm.py, and its config.json.

h0 = scale_emb * embedding; every branch is multiplied by scale_depth / sqrt(n_layer) before it is added; the head sees
the normalised stream divided by hidden_size / dim_model_base; the gate passes fatrelu with hidden_act_param (ProSparse,
Song et al. 2024).
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from powerinfer_tools.checkpoint import open_checkpoint
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.reference import forward
from tests.checkpoint.test_huggingface import edit
from tests.families.definitions import Weights, decode
from tests.tiny_families import make_minicpm, read_config
from tests.tiny_gguf import make_gguf

ODD = {"n_layer": 12, "n_embd": 120, "n_ff": 168, "n_head": 3, "n_head_kv": 1, "n_vocab": 317}
TOKENS = torch.randint(300, (40,), generator=torch.Generator().manual_seed(1))


def fat_relu(weights: Weights, base: str, x: Tensor, stream: Tensor) -> Tensor:
    gate, up = (x @ weights[f"{base}.{part}_proj.weight"].T for part in ("gate", "up"))
    return torch.where(gate > 0.05, gate, 0.0) * up @ weights[f"{base}.down_proj.weight"].T


def defined(folder: Path) -> Tensor:
    config = read_config(folder)
    residual = config["scale_depth"] / config["num_hidden_layers"] ** 0.5
    logit = config["dim_model_base"] / config["hidden_size"]
    return decode(folder, TOKENS, fat_relu, embedding=config["scale_emb"], residual=residual, logit=logit)


@pytest.mark.parametrize("tied", [True, False])
def test_computes_what_is_published(tmp_path: Path, tied: bool) -> None:
    folder = make_minicpm(tmp_path, tied=tied, **ODD)
    checkpoint, expected = open_checkpoint(folder), defined(folder)
    assert checkpoint.config.tied is tied
    assert expected.std() > 0.1
    assert (forward(checkpoint, TOKENS[None])[0] - expected).abs().max() <= 1e-4


def test_config(tmp_path: Path) -> None:
    config = open_checkpoint(make_minicpm(tmp_path)).config
    assert (config.arch, config.activation, config.thresholds) == ("minicpm", "fatrelu", (0.05, 0.05))
    assert (config.gated, config.tied, config.norm) == (True, True, "rms")


def test_scales_are_folded_into_weights(tmp_path: Path) -> None:
    folder = make_minicpm(tmp_path, n_layer=3)
    checkpoint, weights = open_checkpoint(folder), read_weights(folder)
    residual = np.float32(1.4 / 3**0.5)
    for ours, theirs, scale in (
        ("token_embd.weight", "model.embed_tokens.weight", 12),
        ("blk.1.attn_output.weight", "model.layers.1.self_attn.o_proj.weight", residual),
        ("blk.2.ffn_down.weight", "model.layers.2.mlp.down_proj.weight", residual),
        ("output_norm.weight", "model.norm.weight", 24 / 64 / 12),
        ("blk.2.ffn_up.weight", "model.layers.2.mlp.up_proj.weight", 1),
    ):
        np.testing.assert_allclose(checkpoint.read(ours), weights[theirs] * np.float32(scale), rtol=3e-7)
        np.testing.assert_array_equal(checkpoint.read(ours, slice(5, 9)), checkpoint.read(ours)[5:9])


def test_gguf_is_the_same_model(tmp_path: Path) -> None:
    folder = make_minicpm(tmp_path / "hf", n_layer=3)
    scales = {"embedding_scale": 12.0, "residual_scale": 1.4 / 3**0.5, "logit_scale": 64 / 24}
    keys = {f"minicpm.{key}": value for key, value in scales.items()}
    path = make_gguf(tmp_path / "m.gguf", folder, arch="minicpm", keys=keys)
    found, expected = open_checkpoint(path, "fatrelu:0.05"), open_checkpoint(folder)
    assert found.names() == expected.names()
    assert (found.config.arch, found.config.activation, found.config.thresholds) == ("minicpm", "fatrelu", (0.05,) * 3)
    for name in found.names():
        np.testing.assert_allclose(found.read(name), expected.read(name), rtol=3e-7)
    assert (forward(found, TOKENS[None]) - forward(expected, TOKENS[None])).abs().max() <= 1e-5
    assert found.digest() != open_checkpoint(path, "fatrelu:0.03").digest()
    for missing in keys:
        make_gguf(path, folder, arch="minicpm", keys=keys | {missing: None})
        with pytest.raises(PowerinferError, match=f"{missing}: expected a number, found nothing"):
            open_checkpoint(path)


@pytest.mark.parametrize("asked", ["fatrelu:", "fatrelu:-1", "fatrelu:x", "relu:0.1", "fatrelu:nan"])
def test_gguf_needs_the_threshold(tmp_path: Path, asked: str) -> None:
    keys = {f"minicpm.{key}": 1.0 for key in ("embedding_scale", "residual_scale", "logit_scale")}
    path = make_gguf(tmp_path / "m.gguf", make_minicpm(tmp_path / "hf"), arch="minicpm", keys=keys)
    with pytest.raises(
        PowerinferError, match=r"such as fatrelu:0\.03, .*found|expected 2 numbers, .* or --activation fatrelu:NUMBER"
    ):
        open_checkpoint(path, asked)


def test_gguf_with_a_threshold_takes_no_other(tmp_path: Path) -> None:
    scales = {f"minicpm.{key}": 1.0 for key in ("embedding_scale", "residual_scale", "logit_scale")}
    own = {"powerinfer.activation": "fatrelu", "powerinfer.activation_threshold": [0.1, 0.2]}
    path = make_gguf(tmp_path / "m.gguf", make_minicpm(tmp_path / "hf"), arch="minicpm", keys=scales | own)
    assert open_checkpoint(path, "fatrelu").config.thresholds == pytest.approx((0.1, 0.2))
    with pytest.raises(PowerinferError, match=r"none that the file records, found fatrelu:0\.3"):
        open_checkpoint(path, "fatrelu:0.3")


def test_says_what_it_does_not_know(tmp_path: Path) -> None:
    folder = make_minicpm(tmp_path)
    edit(folder / "config.json", num_experts=8)
    with pytest.raises(PowerinferError, match="num_experts: expected 0, no experts, found 8"):
        open_checkpoint(folder)
    edit(folder / "config.json", num_experts=0, scale_depth=None)
    with pytest.raises(PowerinferError, match="scale_depth: expected a number, found nothing"):
        open_checkpoint(folder)


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")
