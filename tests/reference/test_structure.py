"""Every structural field of Config against a definition written token by token in float64, each alone and together."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from powerinfer_tools.checkpoint import Config
from powerinfer_tools.reference import embed, forward, load_layer, logits
from tests.drawn import STRUCTURES, DrawnCheckpoint, drawn_config

Array = npt.NDArray[np.float64]


class Definition:
    """tokens: the sequence, a position each; every function takes and gives what one token has."""

    def __init__(self, checkpoint: DrawnCheckpoint, tokens: list[int]) -> None:
        self.config: Config = checkpoint.config
        self.weights = {name: tensor.astype(np.float64) for name, tensor in checkpoint.tensors.items()}
        self.tokens = tokens

    def logits(self) -> Array:
        c, w = self.config, self.weights
        streams = [w["token_embd.weight"][token] for token in self.tokens]
        if c.learned_positions:
            streams = [stream + w["position_embd.weight"][p] for p, stream in enumerate(streams)]
        for i in range(c.n_layer):
            mixed = self.attention(f"blk.{i}.", i, [self.norm(f"blk.{i}.attn_norm", s) for s in streams])
            after = [stream + m for stream, m in zip(streams, mixed, strict=True)]
            read = streams if c.parallel else after
            xs = [self.norm(f"blk.{i}.ffn_norm", stream) for stream in read]
            added = [self.ffn(f"blk.{i}.", x, stream) for x, stream in zip(xs, streams, strict=True)]
            streams = [stream + ffn for stream, ffn in zip(after, added, strict=True)]
        head = w["token_embd.weight" if c.tied else "output.weight"]
        found = np.array([head @ self.norm("output_norm", stream) for stream in streams])
        return c.softcap * np.tanh(found / c.softcap) if c.softcap else found

    def norm(self, name: str, x: Array) -> Array:
        w = self.weights[f"{name}.weight"]
        if self.config.norm == "layer":
            return (x - x.mean()) / np.sqrt(x.var() + self.config.norm_eps) * w + self.weights[f"{name}.bias"]
        return self.unit(x) * w

    def unit(self, x: Array) -> Array:
        return x / np.sqrt((x**2).mean() + self.config.norm_eps)

    def attention(self, b: str, i: int, xs: list[Array]) -> list[Array]:
        c = self.config
        q, k, v = ([self.linear(f"{b}attn_{part}", x).reshape(-1, c.head_dim) for x in xs] for part in "qkv")
        q, k = ([[self.turn(i, p, head) for head in heads] for p, heads in enumerate(part)] for part in (q, k))
        return [self.mix(b, q[p], k[: p + 1], v[: p + 1]) for p in range(len(xs))]

    def turn(self, i: int, p: int, head: Array) -> Array:
        c, head = self.config, head.copy()
        if c.rope is not None and (not c.rotary or c.rotary[i]):
            half = len(c.rope.inv_freq)
            for j, frequency in enumerate(c.rope.inv_freq.astype(np.float64)):
                turned = complex(head[j], head[j + half]) * np.exp(1j * p * frequency) * c.rope.scale
                head[j], head[j + half] = turned.real, turned.imag
        return self.unit(head) if c.qk_norm else head

    def mix(self, b: str, q: list[Array], k: Any, v: Any) -> Array:
        c, heads = self.config, []
        for h in range(c.n_head):
            shared = h // (c.n_head // c.n_head_kv)
            scores = np.exp([q[h] @ keys[shared] / np.sqrt(c.head_dim) for keys in k])
            heads.append(sum(s * values[shared] for s, values in zip(scores / scores.sum(), v, strict=True)))
        mixed = np.concatenate(heads)
        return self.linear(f"{b}attn_output", self.unit(mixed) if c.sub_norms else mixed)

    def ffn(self, b: str, x: Array, before: Array) -> Array:
        c = self.config
        up = self.linear(f"{b}ffn_up", x)
        a = np.maximum(self.linear(f"{b}ffn_gate", x) if c.gated else up, 0)
        a = a**2 if c.activation == "relu2" else a
        up = np.maximum(up, 0) if c.activation == "drelu" else up
        h = a * up if c.gated else a
        if c.experts is not None:
            h = np.repeat(self.routes(b, x, before), c.n_ff // c.experts.n) * h
        return self.linear(f"{b}ffn_down", self.unit(h) if c.sub_norms else h)

    def routes(self, b: str, x: Array, before: Array) -> Array:
        experts = self.config.experts
        assert experts is not None
        logits = self.weights[f"{b}ffn_router.weight"] @ (before if experts.routed_by == "layer_input" else x)
        weights = np.exp(logits) if experts.gating == "softmax" else 1 / (1 + np.exp(-logits))
        weights[np.argsort(logits)[: experts.n - experts.n_used]] = 0
        return weights / weights.sum()

    def linear(self, name: str, x: Array) -> Array:
        bias = self.weights.get(f"{name}.bias")
        return self.weights[f"{name}.weight"] @ x + (0 if bias is None else bias)


@pytest.mark.parametrize("name", STRUCTURES)
def test_structure(name: str) -> None:
    checkpoint = DrawnCheckpoint(
        drawn_config(**STRUCTURES[name]), biases=("attn_q", "attn_output", "ffn_up", "ffn_down")
    )
    tokens = np.random.default_rng(1).integers(0, 300, 17).tolist()
    expected = Definition(checkpoint, tokens).logits()
    assert expected.std() > 0.3
    assert np.abs(forward(checkpoint, torch.tensor([tokens]))[0].numpy() - expected).max() <= 1e-4


def test_steps_make_the_whole_of_a_parallel_layer() -> None:
    checkpoint = DrawnCheckpoint(drawn_config(parallel=True, sub_norms=True))
    tokens = torch.arange(16).reshape(2, 8)
    hidden = embed(checkpoint, tokens)
    for i in range(checkpoint.config.n_layer):
        layer = load_layer(checkpoint, i)
        after, x = layer.attention(hidden)
        torch.testing.assert_close(x, layer.ffn_norm(hidden))
        hidden = after + layer.ffn.output(layer.ffn.neurons(x))
    torch.testing.assert_close(logits(checkpoint, hidden), forward(checkpoint, tokens))
