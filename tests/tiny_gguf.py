"""A small Hugging Face folder with llama's names as llama.cpp would write it: a GGUF file."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize
from safetensors.numpy import load_file

LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_sub_norm": "self_attn.attn_sub_norm",
    "ffn_sub_norm": "mlp.ffn_sub_norm",
}


def make_gguf(
    path: Path,
    folder: Path,
    quant: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    *,
    keys: dict[str, Any] | None = None,
    rope_factors: np.ndarray | None = None,
    arch: str = "llama",
    permuted: bool = True,
) -> Path:
    """Writes the (F32, one file) folder as GGUF. keys: more metadata, or other values (None: left out); permuted: the
    architecture has its q and k rows interleaved.
    """
    config = json.loads((folder / "config.json").read_text())
    tensors = _tensors(config, load_file(folder / "model.safetensors"), permuted)
    if rope_factors is not None:
        tensors["rope_freqs.weight"] = rope_factors.astype(np.float32)
    return write_gguf(path, arch, _metadata(config, folder, arch) | (keys or {}), tensors, quant)


def write_gguf(
    path: Path,
    arch: str,
    metadata: dict[str, Any],
    tensors: dict[str, np.ndarray],
    quant: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> Path:
    """A GGUF file of these keys (None: left out) and tensors; matrices are quantised."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        if value is not None:
            _add(writer, key, value)
    for name, array in tensors.items():
        kind = quant if array.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def permute(array: np.ndarray, n_head: int) -> np.ndarray:
    """llama.cpp's order of q and k rows: the two halves of a head interleaved."""
    halves = array.reshape(n_head, 2, array.shape[0] // n_head // 2, *array.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))


def _metadata(config: dict[str, Any], folder: Path, arch: str) -> dict[str, Any]:
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    sizes = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(config.get("rope_theta", 10000.0)),
        "attention.layer_norm_rms_epsilon": config.get("rms_norm_eps"),
        "vocab_size": config["vocab_size"],
    }
    return {f"{arch}.{key}": value for key, value in sizes.items()} | general_keys(folder)


def general_keys(folder: Path) -> dict[str, Any]:
    """What is no architecture's."""
    config = json.loads((folder / "config.json").read_text())
    return {
        "general.name": "tiny",
        "general.license": "apache-2.0",
        **tokenizer_keys(json.loads((folder / "tokenizer.json").read_text()), "gpt-2"),
        "tokenizer.ggml.bos_token_id": config["bos_token_id"],
        "tokenizer.ggml.eos_token_id": config["eos_token_id"],
    }


def tokenizer_keys(tokenizer: dict[str, Any], pre: str) -> dict[str, Any]:
    """tokenizer.ggml.* of a byte-level tokenizer.json."""
    vocab = tokenizer["model"]["vocab"]
    special = {token["content"] for token in tokenizer["added_tokens"] if token["special"]}
    tokens = sorted(vocab, key=lambda token: vocab[token])
    merges = [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": merges,
    }


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def _tensors(config: dict[str, Any], theirs: dict[str, np.ndarray], permuted: bool) -> dict[str, np.ndarray]:
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]} if permuted else {}
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    for i in range(config["num_hidden_layers"]):
        names |= {f"blk.{i}.{ours}": f"model.layers.{i}.{name}" for ours, name in LAYER.items()}
    tensors = {}
    for ours, name in names.items():
        for end in ("weight", "bias"):
            if (array := theirs.get(f"{name}.{end}")) is not None:
                n_head = heads.get(ours.split(".")[-1])
                tensors[f"{ours}.{end}"] = permute(array, n_head) if n_head else array
    return tensors
