"""Small random checkpoints of the families with a plain FFN, falcon, nemotron and arcee, as published."""

from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from tests.tiny import Tensors, _Draw, _write, make_llama
from tests.tiny_families import read_config, rewrite


def make_arcee(folder: Path, **shape: Any) -> Path:
    """Arcee AFM: make_llama's shapes without a gate, relu2."""
    folder = make_llama(folder, activation="relu2", **shape)
    tensors = {name: array for name, array in load_file(folder / "model.safetensors").items() if "gate" not in name}
    config = read_config(folder) | {"architectures": ["ArceeForCausalLM"], "model_type": "arcee"}
    return rewrite(folder, config, tensors)


def make_nemotron(folder: Path, *, share: float | None = 0.5, **shape: Any) -> Path:
    """Nemotron: arcee's shapes with LayerNorm, whose weights lie around 0. share: of a head, rotates."""
    folder, draw = make_arcee(folder, **shape), _Draw(7)
    config, tensors = read_config(folder), load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.endswith("norm.weight")]:
        tensors[name] -= 1
        tensors[name.replace("weight", "bias")] = draw.bias(config["hidden_size"])
    config |= {"architectures": ["NemotronForCausalLM"], "model_type": "nemotron", "partial_rotary_factor": share}
    config["norm_eps"] = config.pop("rms_norm_eps")
    return rewrite(folder, config, tensors)


def make_falcon(
    folder: Path,
    *,
    n_layer: int = 2,
    n_embd: int = 64,
    n_ff: int = 256,
    n_head: int = 4,
    n_head_kv: int | None = None,
    n_vocab: int = 300,
    norms: tuple[str, ...] = ("input_layernorm",),
    bias: bool = False,
    tied: bool = True,
    **fields: Any,
) -> Path:
    """Falcon with ReLU. n_head_kv: None for one; norms: of each layer; fields: more of config.json."""
    draw, root = _Draw(0), "transformer"
    qkv = n_embd + 2 * (n_head_kv or 1) * (n_embd // n_head)
    tensors: Tensors = {f"{root}.word_embeddings.weight": draw.matrix(n_vocab, n_embd, std=1.0)}
    for norm in [f"{root}.h.{i}.{norm}" for i in range(n_layer) for norm in norms] + [f"{root}.ln_f"]:
        tensors |= {f"{norm}.weight": draw.norm(n_embd), f"{norm}.bias": draw.bias(n_embd)}
    for layer in [f"{root}.h.{i}" for i in range(n_layer)]:
        draw.linear(tensors, f"{layer}.self_attention.query_key_value", qkv, n_embd, bias)
        draw.linear(tensors, f"{layer}.self_attention.dense", n_embd, n_embd, bias)
        draw.linear(tensors, f"{layer}.mlp.dense_h_to_4h", n_ff, n_embd, bias)
        draw.linear(tensors, f"{layer}.mlp.dense_4h_to_h", n_embd, n_ff, bias)
    if not tied:
        tensors["lm_head.weight"] = draw.matrix(n_vocab, n_embd)
    config = {
        "architectures": ["FalconForCausalLM"],
        "model_type": "falcon",
        "hidden_size": n_embd,
        "num_hidden_layers": n_layer,
        "num_attention_heads": n_head,
        "num_kv_heads": n_head_kv,
        "ffn_hidden_size": n_ff,
        "vocab_size": n_vocab,
        "layer_norm_epsilon": 1e-5,
        "activation": "relu",
        "alibi": False,
        "bias": bias,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return _write(folder, config | fields, tensors, n_vocab, 1, "F32")
