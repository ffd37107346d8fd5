"""Whether the model still says what it said where predictors choose; layers that change too much go back to gate mode.

A layer's own output error does not tell: a few dimensions of the stream can be so large that a small relative error
there drowns all the others, which the next layer's norm scales up. So whole windows pass the model twice, exactly and
with the predictors.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from powerinfer_tools import reference
from powerinfer_tools.checkpoint.source import Checkpoint
from powerinfer_tools.predictors.fit import Network
from powerinfer_tools.progress import Progress
from powerinfer_tools.reference.norm import load_norm

LOGIT_VALUES = 1 << 23  # held at once, of each run
POSITIONS = 128  # whose neurons are computed at once
LAST = -100  # stands for what comes after a window
SAFETY = 0.8  # of what is left to lose, by the estimate from what was measured


@dataclass(frozen=True)
class Tolerance:
    """What predictors may change. top1: least share of tokens with the same likeliest next token; perplexity: largest
    relative rise."""

    top1: float
    perplexity: float


@dataclass(frozen=True)
class Loss:
    """What predictors did change, over `tokens` of held-out text: as in Tolerance."""

    tokens: int
    top1: float
    perplexity: float

    def within(self, tolerance: Tolerance) -> bool:
        return self.top1 >= tolerance.top1 and self.perplexity <= tolerance.perplexity

    def excess(self, tolerance: Tolerance) -> float:
        """How many times too much was changed: perplexity rises with the square of a change, disagreement with it."""
        disagree, may_disagree = 1 - self.top1, max(1 - tolerance.top1, 1e-9)
        return max((disagree / may_disagree) ** 2, self.perplexity / max(tolerance.perplexity, 1e-9))


@dataclass(frozen=True)
class Screen:
    """One layer's predictor as the engine uses it. always: bool [n_ff], neurons that are computed unasked."""

    network: Network
    always: Tensor

    def passes(self, x: Tensor) -> Tensor:
        """[.., n_embd] -> bool [.., n_ff]."""
        return (self.network.logits(x) >= 0) | self.always


@torch.inference_mode()
def verify(
    checkpoint: Checkpoint,
    tokens: Tensor,
    screens: Mapping[int, Screen],
    tolerance: Tolerance,
    show: Progress,
    device: str = "cpu",
) -> tuple[list[int], Loss]:
    """Which layers may keep their predictor, and the loss with these; tokens: [b, n], screens: by layer.

    Of layers that together change too much, those that shift the next layer's input most go first.
    """
    kept = dict(screens)
    if kept:
        exact, _ = _streams(checkpoint, tokens, {}, show, device)
    while kept:
        predicted, shifts = _streams(checkpoint, tokens, kept, show, device)
        loss = _compare(checkpoint, tokens, exact, predicted)
        if loss.within(tolerance):
            return sorted(kept), loss
        allowed = SAFETY * sum(shifts.values()) / loss.excess(tolerance)
        while kept and (len(kept) == len(shifts) or sum(shifts[i] for i in kept) > allowed):
            del kept[max(kept, key=lambda i: shifts[i])]
    return [], Loss(tokens.numel(), 1.0, 0.0)


def _streams(
    checkpoint: Checkpoint, tokens: Tensor, screens: Mapping[int, Screen], show: Progress, device: str
) -> tuple[Tensor, dict[int, float]]:
    """The stream [b, n, n_embd] after the last layer, and by how much each screen shifts what the next layer sees."""
    hidden, shifts = reference.embed(checkpoint, tokens), {}
    for i in range(checkpoint.config.n_layer):
        shift = _pass_layer(checkpoint, i, hidden, screens.get(i), device)
        if i in screens:
            shifts[i] = shift
        show("verify, layers", i + 1, checkpoint.config.n_layer)
    return hidden, shifts


def _pass_layer(checkpoint: Checkpoint, i: int, hidden: Tensor, screen: Screen | None, device: str) -> float:
    """Moves the stream behind layer i, which is in memory no longer than that; returns the screen's shift."""
    layer = reference.load_layer(checkpoint, i, device)
    following = "output_norm" if i + 1 == checkpoint.config.n_layer else f"blk.{i + 1}.attn_norm"
    norm, shift = load_norm(checkpoint, following, device), 0.0
    for b, window in enumerate(hidden):
        stream, inputs = (full[0] for full in layer.attention(window[None].to(device)))
        for part, x, place in zip(*(torch.split(full, POSITIONS) for full in (stream, inputs, hidden[b])), strict=True):
            h = layer.ffn.neurons(x, layer.routes(place.to(device), x))
            after = part + layer.ffn.output(h)
            if screen is not None:
                seen = norm(after)
                after = part + layer.ffn.output(h * screen.passes(x))
                shift += float((norm(after) - seen).square().sum() / seen.square().sum())
            place.copy_(after)
    return shift


def _compare(checkpoint: Checkpoint, tokens: Tensor, exact: Tensor, predicted: Tensor) -> Loss:
    same, rise = 0, 0.0  # nats, over all tokens that are predicted from others
    following = tokens.roll(-1, dims=1)
    following[:, -1] = LAST
    step = max(1, LOGIT_VALUES // checkpoint.config.n_vocab)
    parts = (torch.split(x.flatten(0, 1), step) for x in (exact, predicted, following))
    for *streams, ids in zip(*parts, strict=True):
        before, after = reference.logits(checkpoint, torch.stack(streams))
        same += int((before.argmax(-1) == after.argmax(-1)).sum())
        for sign, found in ((1, after), (-1, before)):
            rise += sign * float(cross_entropy(found, ids, reduction="sum", ignore_index=LAST))
    n_foreseen = tokens.numel() - len(tokens)
    return Loss(tokens.numel(), same / tokens.numel(), math.expm1(rise / max(n_foreseen, 1)))
