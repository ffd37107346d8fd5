"""How far the student is from its teacher, and the gradients of that."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from powerinfer_tools.sparsify.model import Firing, Student

LAYER_WEIGHT = 0.5  # of the mean relative error of the layers' outputs, beside the divergence
PRESSURE = 20.0  # weight of relu's pressure per unit of active share above the wanted one
LOGIT_VALUES = {"cpu": 1 << 22, "cuda": 1 << 28}  # logits held at once, for teacher and student each


@dataclass
class Outcome:
    """Means over b windows, each [] but for layers' share and magnitudes.

    divergence: KL(teacher || student) in nats a token; error: mean relative squared error of the layers' outputs;
    share: [n_layer] active share; magnitudes: [n_layer, b, sample].
    """

    divergence: Tensor
    error: Tensor
    share: Tensor
    magnitudes: Tensor


def follow(student: Student, tokens: Tensor, streams: list[Tensor]) -> tuple[Tensor, Tensor, list[Firing]]:
    """The student's last stream [b, n, n_embd], its layers' mean relative error [b], and what fired in each layer."""
    hidden = student.teacher.embed(tokens)
    error, firings = torch.zeros(len(tokens), device=hidden.device), []
    for layer, stream in zip(student.layers, streams, strict=True):
        hidden, firing = layer(hidden)
        error = error + ((hidden - stream).square().sum(-1) / stream.square().sum(-1)).mean(1)
        firings.append(firing)
    return hidden, error / len(streams), firings


def add_gradients(student: Student, tokens: Tensor, wanted: float, n_windows: int) -> Outcome:
    """Adds to the gradients those of b windows tokens [b, n], as a part of a step of n_windows."""
    teacher = student.teacher
    with teacher.precision():
        streams = teacher.streams(tokens)
        hidden, error, firings = follow(student, tokens, streams)
        divergence, gradient = _divergence(student, streams[-1], hidden, n_windows)
    share = torch.stack([firing.share for firing in firings])  # [n_layer, b]
    pressure = torch.stack([firing.pressure for firing in firings])
    excess = PRESSURE * (share - wanted).clamp(min=0)
    rest = LAYER_WEIGHT * error.sum() + (excess * pressure).mean(0).sum()
    torch.autograd.backward([hidden, rest], [gradient, torch.full_like(rest, 1 / n_windows)])
    magnitudes = torch.stack([firing.magnitudes for firing in firings])
    return Outcome(divergence, error.detach().mean(), share.mean(1), magnitudes)


def _divergence(student: Student, taught: Tensor, hidden: Tensor, n_windows: int) -> tuple[Tensor, Tensor]:
    """KL a token, and its gradient for `hidden`; a few positions at a time, as logits are many."""
    leaf = hidden.detach().requires_grad_()
    n_tokens = hidden.shape[0] * hidden.shape[1]
    total = torch.zeros((), device=hidden.device)
    step = max(1, LOGIT_VALUES[student.teacher.device] // student.teacher.config.n_vocab)
    for theirs, ours in zip(*(torch.split(x.flatten(0, 1), step) for x in (taught, leaf)), strict=True):
        logits = student.logits(ours)
        with torch.no_grad():
            target = log_softmax(student.teacher.logits(theirs), -1, dtype=torch.float32)
            found = log_softmax(logits, -1, dtype=torch.float32)
            probability = target.exp()
            total += torch.dot(probability.flatten(), target.sub_(found).flatten())
            gradient = found.exp_().sub_(probability).div_(n_windows * hidden.shape[1])
        torch.autograd.backward(logits, gradient.to(logits.dtype))
    assert leaf.grad is not None
    return total / n_tokens, leaf.grad
