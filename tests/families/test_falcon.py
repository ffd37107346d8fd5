"""Falcon against transformers: the three layouts of q, k and v, and where the FFN stands."""

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from powerinfer_tools.checkpoint import open_checkpoint
from powerinfer_tools.errors import PowerinferError
from tests.checkpoint.test_huggingface import edit
from tests.families.test_nemotron import assert_same_model
from tests.reference.test_transformers import assert_equal
from tests.tiny_families import read_config
from tests.tiny_gguf import general_keys, write_gguf
from tests.tiny_plain import make_falcon

ODD = {"n_layer": 12, "n_embd": 120, "n_ff": 161, "n_head": 6, "n_vocab": 317}
NEW = {"new_decoder_architecture": True}
SEQUENTIAL = {"parallel_attn": False, "norms": ("input_layernorm", "post_attention_layernorm")}
SHAPES: dict[str, dict[str, Any]] = {
    "7B": {**ODD, "multi_query": True},
    "40B": {**ODD, **NEW, "n_head_kv": 2, "norms": ("ln_attn", "ln_mlp")},
    "11B, one norm": {**ODD, **NEW, "n_head_kv": 3, "num_ln_in_parallel_attn": 1},
    "plain": {**ODD, "multi_query": False, "n_head_kv": 6},
    "one after the other, biases, untied": {**ODD, **SEQUENTIAL, "bias": True, "tied": False},
    "plain, one after the other": {**SEQUENTIAL, "multi_query": False, "n_head_kv": 4, "bias": True},
}


@pytest.mark.parametrize("name", SHAPES)
def test_computes_what_transformers_computes(tmp_path: Path, name: str) -> None:
    assert_equal(make_falcon(tmp_path, **SHAPES[name]))


def test_config(tmp_path: Path) -> None:
    config = open_checkpoint(make_falcon(tmp_path, **SHAPES["40B"])).config
    assert (config.arch, config.norm, config.parallel, config.gated, config.tied) == (
        "falcon",
        "layer",
        True,
        False,
        True,
    )
    assert (config.n_head, config.n_head_kv, config.head_dim, config.n_ff, config.n_ctx) == (6, 2, 20, 161, 2048)


def test_rows_of_the_fused_matrix(tmp_path: Path) -> None:
    """A slice of q crosses from one group of heads to the next."""
    folder = make_falcon(tmp_path, **SHAPES["40B"])
    fused = load_file(folder / "model.safetensors")["transformer.h.3.self_attention.query_key_value.weight"]
    heads = fused.reshape(2, 5, 20, 120)
    checkpoint = open_checkpoint(folder)
    np.testing.assert_array_equal(checkpoint.read("blk.3.attn_k.weight"), heads[:, 3].reshape(-1, 120))
    np.testing.assert_array_equal(
        checkpoint.read("blk.3.attn_q.weight", slice(50, 90)), heads[:, :3].reshape(-1, 120)[50:90]
    )


def test_rows_are_gathered_one_group_at_a_time(tmp_path: Path) -> None:
    norms = ("ln_attn", "ln_mlp")
    checkpoint = open_checkpoint(make_falcon(tmp_path, n_embd=480, n_head=8, n_head_kv=4, norms=norms, **NEW))
    tracemalloc.start()
    q = checkpoint.read("blk.0.attn_q.weight")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert q.nbytes < peak < 1.4 * q.nbytes


@pytest.mark.parametrize("name", ["7B", "40B", "11B, one norm"])
def test_gguf_is_the_same_model(tmp_path: Path, name: str) -> None:
    folder = make_falcon(tmp_path / "hf", **SHAPES[name])
    assert_same_model(falcon_gguf(tmp_path / "m.gguf", folder), folder, "relu")


def falcon_gguf(path: Path, folder: Path) -> Path:
    """As llama.cpp's conversion/falcon.py: q, k and v in this order; the new decoder's ln_mlp is attn_norm."""
    config, theirs = read_config(folder), load_file(folder / "model.safetensors")
    n_head, n_head_kv = config["num_attention_heads"], config["num_kv_heads"] or 1
    parts = {
        "self_attention.query_key_value": "attn_qkv",
        "self_attention.dense": "attn_output",
        "mlp.dense_h_to_4h": "ffn_up",
        "mlp.dense_4h_to_h": "ffn_down",
        "input_layernorm": "attn_norm",
        "ln_mlp": "attn_norm",
        "ln_attn": "attn_norm_2",
    }
    tensors = {
        "token_embd.weight": theirs["transformer.word_embeddings.weight"],
        **{f"output_norm.{end}": theirs[f"transformer.ln_f.{end}"] for end in ("weight", "bias")},
    }
    for name, array in theirs.items():
        if name.startswith("transformer.h."):
            i, (part, end) = name.split(".")[2], name.split(".", 3)[3].rsplit(".", 1)
            tensors[f"blk.{i}.{parts[part]}.{end}"] = array
    for name in [n for n in tensors if "attn_qkv" in n]:
        groups = tensors[name].reshape(n_head_kv, n_head // n_head_kv + 2, -1, tensors[name].shape[1])
        q, k, v = np.split(groups, [n_head // n_head_kv, n_head // n_head_kv + 1], axis=1)
        tensors[name] = np.concatenate([part.reshape(-1, part.shape[-1]) for part in (q, k, v)])
    keys = {
        "context_length": 2048,
        "tensor_data_layout": "jploski",
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["ffn_hidden_size"],
        "block_count": config["num_hidden_layers"],
        "attention.head_count": n_head,
        "attention.head_count_kv": n_head_kv,
        "attention.layer_norm_epsilon": config["layer_norm_epsilon"],
    }
    return write_gguf(path, "falcon", {f"falcon.{k}": v for k, v in keys.items()} | general_keys(folder), tensors)


def test_gguf_is_gelu_unless_the_user_says_otherwise(tmp_path: Path) -> None:
    path = falcon_gguf(tmp_path / "m.gguf", make_falcon(tmp_path / "hf"))
    with pytest.raises(PowerinferError, match=r"expected an activation of relu, .*found gelu.*--activation"):
        open_checkpoint(path)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "alibi": ({"alibi": True}, "alibi: expected false, rotary positions, found True"),
    "gelu": ({"activation": "gelu"}, "activation: expected one of relu, .*found 'gelu'"),
    "no activation": ({"activation": None}, "hidden_act: expected a string, found nothing"),
    "two norms of the old decoder": ({"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn: expected 1"),
    "new decoder in sequence": ({"new_decoder_architecture": True, "parallel_attn": False}, "parallel_attn: expected"),
    "heads": ({"new_decoder_architecture": True, "num_kv_heads": 3}, "num_kv_heads: expected a divisor of 4, found 3"),
    "heads apart": ({"head_dim": 32}, "head_dim: expected hidden_size 64 / num_attention_heads 4, found 32"),
    "another layout": ({"multi_query": False}, r"query_key_value\.weight: expected \[192, 64\], found \[96, 64\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(tmp_path: Path, name: str) -> None:
    fields, message = REFUSED[name]
    folder = make_falcon(tmp_path)
    open_checkpoint(folder)
    edit(folder / "config.json", **fields)
    with pytest.raises(PowerinferError, match=message):
        open_checkpoint(folder)
