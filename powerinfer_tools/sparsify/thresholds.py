"""One activation threshold a layer: the quantile of |activation| that lets the wanted share of neurons fire."""

import torch
from torch import Tensor

from powerinfer_tools.sparsify.model import Student

STEP = 0.25  # of the way to the quantile that a training step found: single steps are noisy


def quantiles(magnitudes: Tensor, active: float) -> Tensor:
    """[.., n] -> [..]: the value that this share of each row reaches."""
    n = magnitudes.shape[-1]
    k = n - round(active * n)  # so many are to stay below
    return magnitudes.kthvalue(min(n, k + 1), dim=-1).values if k > 0 else torch.zeros_like(magnitudes[..., 0])


def moved(thresholds: tuple[float, ...], now: list[float], following: list[float]) -> list[float]:
    """The thresholds for the next step, where this step's activations have the quantile `now` at this step's share
    and `following` at the next one's: all of the change that is wanted, and a part of what was amiss.
    """
    return [t + STEP * (n - t) + (f - n) for t, n, f in zip(thresholds, now, following, strict=True)]


@torch.no_grad()
def calibrate(student: Student, tokens: Tensor, active: float) -> None:
    """Sets the thresholds on windows tokens [b, n], each layer seeing what the cuts before it left."""
    with student.teacher.precision():
        hidden = student.teacher.embed(tokens)
        for layer in student.layers:
            _, firing = layer(hidden)
            layer.ffn.threshold = float(quantiles(firing.magnitudes, active).mean())
            hidden, _ = layer(hidden)
