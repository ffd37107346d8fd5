"""Small random mixtures of experts, as published: Mixtral, TurboSparse-Mixtral and SmallThinker, folders and GGUF."""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from tests import tiny_gguf
from tests.tiny import Tensors, _Draw, make_llama
from tests.tiny_families import read_config, rewrite

PARTS = {"ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down": "down_proj"}
MIXTRAL = {"ffn_router": "gate", "ffn_gate": "w1", "ffn_up": "w3", "ffn_down": "w2"}
SMALLTHINKER = {"ffn_router": "primary_router", "ffn_gate": "gate", "ffn_up": "up", "ffn_down": "down"}


def make_mixtral(
    folder: Path, *, n_ff: int = 40, n_experts: int = 4, n_used: int = 2, turbosparse: bool = False, **shape: Any
) -> Path:
    """make_llama's shapes; n_ff: of one expert."""
    folder = make_llama(folder, n_ff=n_ff, **{"activation": "relu" if turbosparse else "silu", **shape})
    config, kind = read_config(folder), "turbosparsemixtral" if turbosparse else "mixtral"
    tensors = _experts(load_file(folder / "model.safetensors"), config, n_ff, n_experts, MIXTRAL)
    config |= {"num_local_experts": n_experts, "num_experts_per_tok": n_used, "sliding_window": None}
    config |= {"model_type": kind, "architectures": [f"{'TurboSparse' * turbosparse}MixtralForCausalLM"]}
    for absent in ("attention_bias", "mlp_bias"):
        del config[absent]
    return rewrite(folder, config, tensors)


def make_smallthinker(
    folder: Path,
    *,
    n_ff: int = 24,
    n_experts: int = 6,
    n_used: int = 3,
    softmax: bool = False,
    still: tuple[int, ...] = (),
    window: int | None = None,
    **shape: Any,
) -> Path:
    """make_llama's shapes; n_ff: of one expert; still: layers that do not rotate; window: others slide, within it."""
    folder = make_llama(folder, n_ff=n_ff, **{"tied": True, **shape})
    config = read_config(folder)
    n_layer = config["num_hidden_layers"]
    tensors = _experts(load_file(folder / "model.safetensors"), config, n_ff, n_experts, SMALLTHINKER)
    rotates = [int(i not in still) for i in range(n_layer)]
    config |= {
        "architectures": ["SmallThinkerForCausalLM"],
        "model_type": "smallthinker",
        "moe_ffn_hidden_size": n_ff,
        "moe_num_primary_experts": n_experts,
        "moe_num_active_primary_experts": n_used,
        "moe_primary_router_apply_softmax": softmax,
        "rope_layout": rotates,
        "sliding_window_layout": rotates if window else [0] * n_layer,
        "sliding_window_size": window or 4096,
    }
    for absent in ("attention_bias", "mlp_bias", "hidden_act", "intermediate_size"):
        del config[absent]
    return rewrite(folder, config, tensors)


def _experts(tensors: Tensors, config: dict[str, Any], n_ff: int, n: int, names: dict[str, str]) -> Tensors:
    """The same tensors with a router and n experts in place of each layer's FFN."""
    draw, d = _Draw(11), config["hidden_size"]
    kept = {name: array for name, array in tensors.items() if ".mlp." not in name}
    for i in range(config["num_hidden_layers"]):
        moe = f"model.layers.{i}.block_sparse_moe"
        kept[f"{moe}.{names['ffn_router']}.weight"] = draw.matrix(n, d)
        for e in range(n):
            for part in PARTS:
                shape = (d, n_ff) if part == "ffn_down" else (n_ff, d)
                kept[f"{moe}.experts.{e}.{names[part]}.weight"] = draw.matrix(*shape)
    return kept


def make_moe_gguf(path: Path, folder: Path, *, packed: bool = True, keys: dict[str, Any] | None = None) -> Path:
    """As llama.cpp writes it: Mixtral is a llama; packed: all experts in one tensor, as since 2024."""
    config, theirs = read_config(folder), load_file(folder / "model.safetensors")
    small = config["model_type"] == "smallthinker"
    arch, names = ("smallthinker", SMALLTHINKER) if small else ("llama", MIXTRAL)
    config.setdefault("intermediate_size", config.get("moe_ffn_hidden_size"))
    tensors = tiny_gguf._tensors(config, theirs, permuted=not small)
    for i in range(config["num_hidden_layers"]):
        moe = f"model.layers.{i}.block_sparse_moe"
        tensors[f"blk.{i}.ffn_gate_inp.weight"] = theirs[f"{moe}.{names['ffn_router']}.weight"]
        for part in PARTS:
            experts = [theirs[f"{moe}.experts.{e}.{names[part]}.weight"] for e in range(_count(config))]
            if packed:
                tensors[f"blk.{i}.{part}_exps.weight"] = np.stack(experts)
            else:
                tensors |= {f"blk.{i}.{part}.{e}.weight": expert for e, expert in enumerate(experts)}
    metadata = tiny_gguf._metadata(config, folder, arch) | _keys(config, arch) | (keys or {})
    return tiny_gguf.write_gguf(path, arch, metadata, tensors)


def _count(config: dict[str, Any]) -> int:
    return config.get("num_local_experts") or config["moe_num_primary_experts"]


def _keys(config: dict[str, Any], arch: str) -> dict[str, Any]:
    used = config.get("num_experts_per_tok") or config["moe_num_active_primary_experts"]
    keys = {f"{arch}.expert_count": _count(config), f"{arch}.expert_used_count": used}
    if arch == "smallthinker":
        keys["smallthinker.expert_feed_forward_length"] = config["moe_ffn_hidden_size"]
        keys["smallthinker.expert_gating_func"] = 1 if config["moe_primary_router_apply_softmax"] else 2
        if any(config["sliding_window_layout"]):
            keys["smallthinker.attention.sliding_window"] = config["sliding_window_size"]
    return keys
