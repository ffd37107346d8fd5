"""Perplexity on held-out windows by the reference, in float32, one layer in memory at a time."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from powerinfer_tools import reference
from powerinfer_tools.checkpoint import Checkpoint
from powerinfer_tools.progress import Progress
from powerinfer_tools.reference.norm import load_norm
from powerinfer_tools.reference.weights import tensor
from powerinfer_tools.sparsify.documents import Ids

BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Quality:
    """perplexity: by source, and of all tokens as "all"; active: each layer's share of neurons that fire."""

    tokens: int
    perplexity: dict[str, float]
    active: list[float]


@torch.no_grad()
def evaluate(checkpoint: Checkpoint, sources: Mapping[str, Ids], device: str, show: Progress, what: str) -> Quality:
    """sources: windows [n, window] by name, all of one length. what: the progress's name."""
    tokens = torch.cat([torch.from_numpy(windows).long() for windows in sources.values()])
    hidden = reference.embed(checkpoint, tokens)
    n_layer, active = checkpoint.config.n_layer, []
    for i in range(n_layer):
        active.append(_pass_layer(reference.load_layer(checkpoint, i, device), hidden, device))
        show(what, i + 1, n_layer + 1)
    losses = _losses(checkpoint, hidden, tokens, device)
    show(what, n_layer + 1, n_layer + 1)
    parts = torch.split(losses, [len(windows) for windows in sources.values()])
    perplexity = {name: math.exp(part.mean()) for name, part in zip(sources, parts, strict=True)}
    return Quality(tokens.numel(), perplexity | {"all": math.exp(losses.mean())}, active)


def _pass_layer(layer: reference.Layer, hidden: Tensor, device: str) -> float:
    """Moves the stream [b, n, n_embd] behind the layer; returns the share of neurons that fired."""
    n_fired = n_all = 0
    for part in torch.split(hidden, max(1, BATCH_TOKENS // hidden.shape[1])):
        after, x = layer.attention(part.to(device))
        neurons = layer.ffn.neurons(x)
        n_fired += int(neurons.count_nonzero())
        n_all += neurons.numel()
        part.copy_(after + layer.ffn.output(neurons))
    return n_fired / n_all


def _losses(checkpoint: Checkpoint, hidden: Tensor, tokens: Tensor, device: str) -> Tensor:
    """Nats a token of each window, [b] float64."""
    norm = load_norm(checkpoint, "output_norm", device)
    head = tensor(checkpoint, "token_embd.weight" if checkpoint.config.tied else "output.weight", device)
    losses = [
        cross_entropy(linear(norm(stream[:-1].to(device)), head), ids[1:].to(device)).double()
        for stream, ids in zip(hidden, tokens, strict=True)
    ]
    return torch.stack(losses).cpu()
