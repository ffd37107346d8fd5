"""BitNet b1.58: the float model against transformers, and the releases of ternary weights, to be made or packed."""

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from powerinfer_tools.checkpoint import open_checkpoint
from powerinfer_tools.errors import PowerinferError
from tests.checkpoint.test_huggingface import edit
from tests.reference.test_transformers import assert_equal
from tests.tiny_families import MATRICES, make_bitnet, pack, read_config, rewrite, ternary
from tests.tiny_gguf import make_gguf

SHAPES: dict[str, dict[str, Any]] = {
    "deep": {"n_layer": 12},
    "odd, untied": {
        "n_layer": 12,
        "n_embd": 120,
        "n_ff": 161,
        "n_head": 6,
        "n_head_kv": 2,
        "n_vocab": 317,
        "tied": False,
    },
}


@pytest.mark.parametrize("name", SHAPES)
def test_computes_what_transformers_computes(tmp_path: Path, name: str) -> None:
    assert_equal(make_bitnet(tmp_path, **SHAPES[name]))


def test_config(tmp_path: Path) -> None:
    config = open_checkpoint(make_bitnet(tmp_path)).config
    assert (config.arch, config.activation, config.gated, config.sub_norms) == ("bitnet", "relu2", True, True)


def test_sub_norms_are_folded_into_columns(tmp_path: Path) -> None:
    folder = make_bitnet(tmp_path)
    checkpoint, weights = open_checkpoint(folder), load_file(folder / "model.safetensors")
    for ours, matrix, norm in (
        ("attn_output", "self_attn.o_proj", "self_attn.attn_sub_norm"),
        ("ffn_down", "mlp.down_proj", "mlp.ffn_sub_norm"),
    ):
        base = "model.layers.1"
        expected = weights[f"{base}.{matrix}.weight"] * weights[f"{base}.{norm}.weight"]
        np.testing.assert_array_equal(checkpoint.read(f"blk.1.{ours}.weight"), expected)
        np.testing.assert_array_equal(checkpoint.read(f"blk.1.{ours}.weight", slice(9, 30)), expected[9:30])


def assert_as_transformers(master: np.ndarray, numbers: np.ndarray, scale: np.float32) -> None:
    """Both ways in which transformers has ternary weights: made of master weights, and packed, with a scale."""
    from transformers.integrations.bitnet import AutoBitLinear, WeightQuant, pack_weights

    linear = AutoBitLinear(*master.shape[::-1], bias=False)
    linear.weight.data, linear.weight_scale = torch.from_numpy(numbers), torch.tensor([scale])
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        made = WeightQuant.apply(torch.from_numpy(master)).numpy()
        used = linear(torch.eye(master.shape[1])).T.numpy()  # rounding to 8 bits keeps 0 and 1
    np.testing.assert_allclose(numbers * scale, made, rtol=1e-6)
    np.testing.assert_allclose(numbers * scale, used, rtol=1e-6)
    np.testing.assert_array_equal(pack(numbers), pack_weights(torch.from_numpy(numbers.copy())).numpy())


@pytest.mark.parametrize("weights", ["master", "packed"])
def test_ternary_weights(tmp_path: Path, weights: str) -> None:
    """Either release is the float model of its ternary weights; rounding of activations to 8 bits is left out."""
    plain = make_bitnet(tmp_path / "float", n_layer=12, n_ff=162)
    tensors = load_file(plain / "model.safetensors")
    for name in [n for n in tensors if n.removesuffix(".weight").endswith(MATRICES)]:
        numbers, scale = ternary(tensors[name])
        assert_as_transformers(tensors[name], numbers, scale)
        tensors[name] = numbers * scale
    rewrite(plain, read_config(plain), tensors)
    assert_equal(plain)
    found, expected = (
        open_checkpoint(make_bitnet(tmp_path / weights, weights=weights, n_layer=12, n_ff=162)),
        open_checkpoint(plain),
    )
    assert found.names() == expected.names()
    for name in found.names():
        np.testing.assert_allclose(found.read(name), expected.read(name), rtol=3e-7)
    for name in ("blk.3.attn_q.weight", "blk.5.ffn_down.weight"):  # 64 rows: a slice over two and more quarters
        whole = found.read(name)
        for rows in (slice(3, 9), slice(14, 33), slice(0, 64), slice(50, 50)):
            np.testing.assert_array_equal(found.read(name, rows), whole[rows])
    assert any("8 bits" in note for note in found.notes)


def test_the_scale_of_master_weights_costs_no_matrix(tmp_path: Path) -> None:
    """The mean magnitude of a matrix is taken a block of rows at a time."""
    folder = make_bitnet(tmp_path, weights="master", n_layer=1, n_embd=128, n_ff=16384)
    checkpoint = open_checkpoint(folder)
    tracemalloc.start()
    checkpoint.read("blk.0.ffn_up.weight", slice(0, 2))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 128 * 16384 * 4 // 2


def test_gguf_is_the_same_model(tmp_path: Path) -> None:
    folder = make_bitnet(tmp_path / "hf")
    path = make_gguf(tmp_path / "m.gguf", folder, arch="bitnet", permuted=False)
    expected = open_checkpoint(folder)
    with pytest.raises(PowerinferError, match="found silu or relu2, which GGUF does not record"):
        open_checkpoint(path)
    found = open_checkpoint(path, "relu2")
    assert found.names() == expected.names()
    assert (found.config.arch, found.config.tied, found.config.sub_norms) == ("bitnet", True, True)
    for name in found.names():
        np.testing.assert_array_equal(found.read(name), expected.read(name))
    make_gguf(path, folder, arch="bitnet", permuted=False, keys={"bitnet.hidden_activation": "relu2"})
    assert open_checkpoint(path).config.activation == "relu2"
    with pytest.raises(PowerinferError, match="records the activation relu2, expected silu"):
        open_checkpoint(path, "silu")


def test_refuses_other_quantisations(tmp_path: Path) -> None:
    folder = make_bitnet(tmp_path, weights="packed")
    for field, value in (("quant_method", "gptq"), ("linear_class", "bitlinear"), ("quantization_mode", "nightly")):
        good = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}
        edit(folder / "config.json", quantization_config=good | {field: value})
        with pytest.raises(PowerinferError, match=f"quantization_config: {field}: expected .*, found '{value}'"):
            open_checkpoint(folder)
