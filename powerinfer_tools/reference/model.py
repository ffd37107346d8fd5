"""Tokens in, logits out, and never more than one layer in memory."""

import torch
from torch import Tensor

from powerinfer_tools.checkpoint import Checkpoint
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.reference.layer import load_layer
from powerinfer_tools.reference.norm import load_norm
from powerinfer_tools.reference.weights import tensor

VOCAB_CHUNK = 8192  # rows of a vocabulary matrix held at once


def embed(checkpoint: Checkpoint, tokens: Tensor) -> Tensor:
    """Token ids [b, n] -> [b, n, n_embd], with learned positions 0..n-1 where the model has them.

    Errors: more tokens than the model's context; an id outside the vocabulary.
    """
    config = checkpoint.config
    n = tokens.shape[-1]
    if n > config.n_ctx:
        raise PowerinferError(f"{config.name}: expected at most {config.n_ctx} positions, found {n}")
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < config.n_vocab:
        raise PowerinferError(f"{config.name}: expected token ids below {config.n_vocab}, found others")
    hidden = torch.empty(*tokens.shape, config.n_embd)
    for rows in _chunks(config.n_vocab):
        here = (tokens >= rows.start) & (tokens < rows.stop)
        if here.any():
            hidden[here] = tensor(checkpoint, "token_embd.weight", rows=rows)[tokens[here] - rows.start]
    if config.learned_positions:
        hidden += tensor(checkpoint, "position_embd.weight", rows=slice(0, n))
    return hidden


def logits(checkpoint: Checkpoint, hidden: Tensor) -> Tensor:
    """The stream after the last layer [.., n_embd] -> [.., n_vocab]: normalised, times the output matrix, capped."""
    config = checkpoint.config
    device = str(hidden.device)
    x = load_norm(checkpoint, "output_norm", device)(hidden)
    name = "token_embd.weight" if config.tied else "output.weight"
    parts = [x @ tensor(checkpoint, name, device, rows).T for rows in _chunks(config.n_vocab)]
    return cap(torch.cat(parts, dim=-1), config.softcap)


def cap(logits: Tensor, softcap: float) -> Tensor:
    """Logits within +-softcap, where the model has one."""
    return softcap * (logits / softcap).tanh() if softcap > 0 else logits


@torch.no_grad()
def forward(checkpoint: Checkpoint, tokens: Tensor, device: str = "cpu") -> Tensor:
    """Token ids [b, n] -> logits [b, n, n_vocab]."""
    hidden = embed(checkpoint, tokens).to(device)
    for i in range(checkpoint.config.n_layer):
        hidden = load_layer(checkpoint, i, device)(hidden)
    return logits(checkpoint, hidden)


def _chunks(n: int) -> list[slice]:
    return [slice(start, min(start + VOCAB_CHUNK, n)) for start in range(0, n, VOCAB_CHUNK)]
