"""Small random checkpoints of bitnet, nanochat, minicpm and bamboo, with the names and fields that are published."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.tiny import Tensors, _Draw, _write, make_llama

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_bitnet(folder: Path, *, weights: str = "float", n_ff: int = 160, **shape: Any) -> Path:
    """BitNet b1.58: make_llama's shapes, relu2, a norm before o_proj and one before down_proj.

    weights: float; master (float, made ternary where they are used, as in the bf16 release); packed (ternary, four
    rows in a row of bytes, with a scale).
    """
    folder = make_llama(folder, n_ff=n_ff, activation="relu2", **{"tied": True} | shape)
    config = read_config(folder)
    tensors, draw = load_file(folder / "model.safetensors"), _Draw(7)
    tensors["model.embed_tokens.weight"] /= 4  # it may make the logits, too
    for i in range(config["num_hidden_layers"]):
        tensors[f"model.layers.{i}.self_attn.attn_sub_norm.weight"] = draw.norm(config["hidden_size"])
        tensors[f"model.layers.{i}.mlp.ffn_sub_norm.weight"] = draw.norm(n_ff)
    quantised = {"quant_method": "bitnet", "linear_class": "autobitlinear"}
    modes = {"float": None, "master": "online", "packed": "offline"}
    if weights == "packed":
        _pack_all(tensors)
    config |= {"architectures": ["BitNetForCausalLM"], "model_type": "bitnet", "rope_theta": 500000.0}
    config["quantization_config"] = quantised | {"quantization_mode": modes[weights]} if modes[weights] else None
    for absent in ("head_dim", "rope_scaling", "attention_bias", "mlp_bias"):
        config.pop(absent)
    return rewrite(folder, config, tensors)


def ternary(matrix: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """Ma et al. 2024 (arXiv 2402.17764), equations 1 to 3: numbers in {-1, 0, 1}, and the mean magnitude."""
    scale = np.float32(np.abs(matrix).mean(dtype=np.float64))
    return np.clip(np.round(matrix / scale), -1, 1).astype(np.float32), scale


def pack(numbers: np.ndarray) -> np.ndarray:
    """Two bits a number, its value + 1: the rows' four quarters over one another, the last one filled up."""
    quarters = np.split(np.pad((numbers + 1).astype(np.uint8), ((0, -len(numbers) % 4), (0, 0))), 4)
    return np.bitwise_or.reduce([quarter << 2 * i for i, quarter in enumerate(quarters)])


def _pack_all(tensors: Tensors) -> None:
    for name in [n for n in tensors if n.removesuffix(".weight").endswith(MATRICES)]:
        numbers, scale = ternary(tensors[name])
        tensors |= {name: pack(numbers), f"{name}_scale": np.array([scale])}


def make_nanochat(
    folder: Path,
    *,
    n_layer: int = 2,
    n_embd: int = 64,
    n_ff: int = 256,
    n_head: int = 4,
    n_head_kv: int = 4,
    n_vocab: int = 300,
    bias: bool = False,
) -> Path:
    """nanochat: norms without weights, relu2 without a gate, capped logits."""
    draw, head_dim = _Draw(0), n_embd // n_head
    tensors: Tensors = {"model.embed_tokens.weight": draw.matrix(n_vocab, n_embd, std=2.0)}
    for i in range(n_layer):
        layer = f"model.layers.{i}"
        for part, n in (("q", n_head * head_dim), ("k", n_head_kv * head_dim), ("v", n_head_kv * head_dim)):
            draw.linear(tensors, f"{layer}.self_attn.{part}_proj", n, n_embd, bias)
        draw.linear(tensors, f"{layer}.self_attn.o_proj", n_embd, n_head * head_dim, bias)
        draw.linear(tensors, f"{layer}.mlp.fc1", n_ff, n_embd, False)
        draw.linear(tensors, f"{layer}.mlp.fc2", n_embd, n_ff, False)
    tensors["lm_head.weight"] = draw.matrix(n_vocab, n_embd, std=0.5)  # so that the cap is felt
    config = {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        "hidden_size": n_embd,
        "intermediate_size": n_ff,
        "num_hidden_layers": n_layer,
        "num_attention_heads": n_head,
        "num_key_value_heads": n_head_kv,
        "vocab_size": n_vocab,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "hidden_act": "relu2",
        "attention_bias": bias,
        "final_logit_softcapping": 15.0,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return _write(folder, config, tensors, n_vocab, 1, "F32")


def make_minicpm(folder: Path, *, tied: bool = True, **shape: Any) -> Path:
    """MiniCPM-S: llama with fatrelu and three scales; as published, without model_type and what has a default."""
    folder = make_llama(folder, activation="fatrelu", **{"tied": tied} | shape)
    config = read_config(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] /= 12
    if not tied:
        config["tie_word_embeddings"] = False
    else:
        del config["tie_word_embeddings"]
    for absent in ("model_type", "head_dim", "rope_theta", "attention_bias", "mlp_bias"):
        config.pop(absent)
    config |= {
        "architectures": ["MiniCPMForCausalLM"],
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 24,
        "initializer_range": 0.1,
    }
    return rewrite(folder, config, tensors)


def make_bamboo(folder: Path, *, predictor: int = 0, **shape: Any) -> Path:
    """Bamboo, and with predictors of that rank TurboSparse-Mistral."""
    folder = make_llama(folder, model_type="mistral", **shape)
    config = read_config(folder)
    tensors, draw = load_file(folder / "model.safetensors"), _Draw(7)
    for i in range(config["num_hidden_layers"] if predictor else 0):
        base = f"model.layers.{i}.mlp.predictor"
        tensors[f"{base}.fc1.weight"] = draw.matrix(predictor, config["hidden_size"])
        tensors[f"{base}.fc2.weight"] = draw.matrix(config["intermediate_size"], predictor)
    config |= {"architectures": ["BambooForCausalLM"], "model_type": "bamboo", "sliding_window": 128}
    del config["head_dim"]
    return rewrite(folder, config, tensors)


def read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def rewrite(folder: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    """`folder` with other fields (None: left out) and other tensors."""
    present = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(present, indent=1))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder
