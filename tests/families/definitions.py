"""A decoder written from the authors' published definitions alone, for families that transformers lacks.

Llama's layer (Touvron et al. 2023, section 2.2): RMSNorm before attention and FFN, rotary positions on complex pairs
(Su et al. 2021, eq. 34), grouped heads. What a family does otherwise is given to it.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.tiny_families import read_config

Weights = dict[str, Tensor]
Mlp = Callable[[Weights, str, Tensor, Tensor], Tensor]  # weights, "model.layers.N.mlp", normalised input, stream


def decode(
    folder: Path, tokens: Tensor, mlp: Mlp, *, embedding: float = 1.0, residual: float = 1.0, logit: float = 1.0
) -> Tensor:
    """Token ids [n] -> logits [n, n_vocab]. Embedding, branches and last norm are multiplied by a number."""
    config, weights = read_config(folder), load_file(folder / "model.safetensors")
    eps, embed = config["rms_norm_eps"], weights["model.embed_tokens.weight"]
    stream = embedding * embed[tokens]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        x = normalise(stream, weights[f"{layer}.input_layernorm.weight"], eps)
        stream = stream + residual * attend(weights, f"{layer}.self_attn", x, config["num_attention_heads"])
        x = normalise(stream, weights[f"{layer}.post_attention_layernorm.weight"], eps)
        stream = stream + residual * mlp(weights, f"{layer}.mlp", x, stream)
    x = logit * normalise(stream, weights["model.norm.weight"], eps)
    return x @ weights.get("lm_head.weight", embed).T


def normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / ((x**2).mean(-1, keepdim=True) + eps).sqrt() * weight


def attend(weights: Weights, base: str, x: Tensor, n_head: int, rotates: bool = True) -> Tensor:
    """[n, n_embd] -> [n, n_embd], one query head at a time."""
    n, head_dim = x.shape[0], weights[f"{base}.q_proj.weight"].shape[0] // n_head
    q, k, v = ((x @ weights[f"{base}.{part}_proj.weight"].T).reshape(n, -1, head_dim).transpose(0, 1) for part in "qkv")
    q, k, group = *((rotate(q), rotate(k)) if rotates else (q, k)), n_head // k.shape[0]
    unseen = torch.ones(n, n).triu(1).bool()
    heads = []
    for h in range(n_head):
        scores = (q[h] @ k[h // group].T / head_dim**0.5).masked_fill(unseen, -torch.inf)
        heads.append(scores.softmax(-1) @ v[h // group])
    return torch.cat(heads, -1) @ weights[f"{base}.o_proj.weight"].T


def rotate(x: Tensor) -> Tensor:
    """[heads, n, head_dim]: the pair (x[j], x[j + head_dim / 2]) of position p turns by p * 10000^(-2j / head_dim)."""
    half = x.shape[-1] // 2
    angles = torch.outer(torch.arange(x.shape[1]), 10000.0 ** (-torch.arange(half) / half))
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), -1)
