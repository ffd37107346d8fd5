"""Causal attention with grouped key and value heads."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from powerinfer_tools.checkpoint import Checkpoint, Rope
from powerinfer_tools.reference.norm import unit_rms
from powerinfer_tools.reference.weights import optional, tensor


@dataclass
class Linear:
    """weight: [n_out, n_in]; bias: [n_out] or None."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


@dataclass
class Attention:
    """softmax(q . k / sqrt(head_dim)) . v a head (Vaswani et al. 2017, eq. 1), then the output matrix.

    qk_eps: of the RMSNorm of each head's q and k, sub_eps: of that of all heads before the output matrix; None: none.
    """

    head_dim: int
    rope: Rope | None
    q: Linear
    k: Linear
    v: Linear
    output: Linear
    qk_eps: float | None = None
    sub_eps: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """[b, n, n_embd] -> [b, n, n_embd]; row p of n is position p and sees positions 0..p."""
        q, k, v = self.heads(x)
        mixed = _products(q, k, v) if torch.is_autocast_enabled("cpu") else _fused(q, k, v)
        return self.merge(mixed.transpose(1, 2).flatten(2))

    def merge(self, mixed: Tensor) -> Tensor:
        """What all heads gave, [b, n, n_head * head_dim] -> [b, n, n_embd]."""
        return self.output(mixed if self.sub_eps is None else unit_rms(mixed, self.sub_eps))

    def heads(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of x, [b, heads, n, head_dim] each, at the positions from `start` on."""
        q, k, v = (
            part(x).reshape(*x.shape[:2], -1, self.head_dim).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        if self.rope is not None:
            q, k = rotate(q, self.rope, start), rotate(k, self.rope, start)
        if self.qk_eps is not None:
            q, k = unit_rms(q, self.qk_eps), unit_rms(k, self.qk_eps)
        return q, k, v


def _fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of [b, heads, n, head_dim]; k and v have fewer heads where queries share them."""
    group = q.shape[1] // k.shape[1]  # query heads that share a key head
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def _products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same in products: in bfloat16 on a CPU, torch's fused attention takes 2.5 times as long."""
    b, n_head_kv, n, head_dim = k.shape
    q = q.reshape(b, n_head_kv, -1, head_dim) / head_dim**0.5  # [b, n_head_kv, group * n, head_dim]
    scores = torch.matmul(q, k.transpose(-1, -2)).reshape(b, n_head_kv, -1, n, n)
    unseen = torch.full((n, n), -math.inf, dtype=scores.dtype).triu(1)
    weights = (scores + unseen).softmax(-1, dtype=scores.dtype).flatten(2, 3)
    return torch.matmul(weights, v).reshape(b, -1, n, head_dim)


def rotate(x: Tensor, rope: Rope, start: int = 0) -> Tensor:
    """Rotary positions (Su et al. 2021, eq. 34) on [.., n, head_dim]; pairs (x[i], x[i + rotary_dim / 2]).

    Dimensions from rotary_dim on stay as they are.
    """
    positions = torch.arange(start, start + x.shape[-2], dtype=torch.float32, device=x.device)
    angles = torch.outer(positions, torch.from_numpy(rope.inv_freq).to(x.device))  # [n, rotary_dim / 2]
    cos, sin = rope.scale * angles.cos(), rope.scale * angles.sin()
    half = len(rope.inv_freq)
    left, right, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((left * cos - right * sin, right * cos + left * sin, rest), dim=-1)


def load_attention(checkpoint: Checkpoint, i: int, device: str = "cpu") -> Attention:
    """Layer i's attention."""

    def load(part: str) -> Linear:
        name = f"blk.{i}.attn_{part}"
        return Linear(tensor(checkpoint, f"{name}.weight", device), optional(checkpoint, f"{name}.bias", device))

    config = checkpoint.config
    return Attention(
        config.head_dim,
        config.rope_of(i),
        load("q"),
        load("k"),
        load("v"),
        load("output"),
        qk_eps=config.norm_eps if config.qk_norm else None,
        sub_eps=config.norm_eps if config.sub_norms else None,
    )
