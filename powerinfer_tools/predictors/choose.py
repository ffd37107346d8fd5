"""A predictor's threshold and always-computed prefix: the fewest bytes within the bounds, on held-out samples."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from powerinfer_tools.predictors.fit import Network
from powerinfer_tools.predictors.select import FfnCosts

ROUNDS = 2  # threshold and prefix depend on each other
FINENESS = 32  # of the misses that recall allows, the threshold that the error allows is found to this part


@dataclass(frozen=True)
class Choice:
    """What a predictor does on held-out samples at its threshold.

    computed, found: neurons a token whose select row is read, and those of them that fire; recall: of all that fire,
    the share that is computed; error: mean over tokens of |y_predicted - y|^2 / |y|^2; bytes: a token reads.
    """

    threshold: float
    always: int
    computed: float
    found: float
    recall: float
    error: float
    bytes: float


class HeldOut:
    """Samples that no predictor was fitted to, neurons in the stored order.

    x [n, n_embd]; fired bool [n, n_ff]; h [n, n_ff], what the neurons give; down [n_ff, n_embd]; candidates bool
    [n, n_ff], those of each token's experts, or None: all are.
    """

    def __init__(
        self, x: Tensor, fired: Tensor, h: Tensor, down: Tensor, order: Tensor, candidates: Tensor | None = None
    ) -> None:
        self.x, self.order = x, order
        self.candidates = torch.ones_like(fired) if candidates is None else candidates[:, order]
        self.fired, self.h, self.down = fired[:, order], h[:, order] * fired[:, order], down[order]
        self._size = (self.h @ self.down).square().sum(1)
        self.n_fired = int(self.fired.sum())

    def logits(self, network: Network) -> Tensor:
        """[n, n_ff] in the stored order."""
        return network.logits(self.x)[:, self.order]

    def error(self, missed: Tensor) -> float:
        """Mean over tokens of |sum of the missed neurons' outputs|^2 / |y|^2; missed: bool [n, n_ff]."""
        lost = ((self.h * missed) @ self.down).square().sum(1)
        return float(torch.where(self._size > 0, lost / self._size, 0.0).mean())


def choose(network: Network, held: HeldOut, costs: FfnCosts, recall: float, error: float) -> Choice:
    """The largest threshold within the bounds, and the prefix that is dearer asked about than computed."""
    logits = held.logits(network)
    always = 0
    for _ in range(ROUNDS):
        threshold = _threshold(logits, held, always, recall, error)
        let_through = (held.candidates & (logits >= threshold)).float().mean(0)
        following = costs.always(network.rank, let_through.cpu().numpy())
        if following == always:
            break
        always = following
    threshold = _threshold(logits, held, always, recall, error)
    return _measure(logits, held, costs, network.rank, threshold, always)


def _threshold(logits: Tensor, held: HeldOut, always: int, recall: float, error: float) -> float:
    """The largest threshold with at most the misses that the recall allows, and the error within its bound."""
    fired = held.fired[:, always:]
    asked = logits[:, always:][fired]
    most = min(int((1 - recall) * held.n_fired), len(asked) - 1)
    if most < 0:
        return float(logits.max()) + 1.0  # whatever fires is computed unasked
    scores = asked.topk(most + 1, largest=False).values  # rising

    def too_far(n_missed: int) -> bool:
        missed = held.fired & (logits < scores[n_missed])
        missed[:, :always] = False
        return held.error(missed) > error

    return float(scores[_last(most, too_far)])


def _last(most: int, too_far: Callable[[int], bool]) -> int:
    """The largest of 0..most that is not too far, by bisection; 0 never is."""
    if not too_far(most):
        return most
    good, bad = 0, most
    while bad - good > max(1, most // FINENESS):
        middle = (good + bad) // 2
        good, bad = (good, middle) if too_far(middle) else (middle, bad)
    return good


def _measure(logits: Tensor, held: HeldOut, costs: FfnCosts, rank: int, threshold: float, always: int) -> Choice:
    computed = logits >= threshold
    computed[:, :always] = True
    computed &= held.candidates
    found = held.fired & computed
    n = len(logits)
    n_computed, n_found = float(computed.sum()) / n, float(found.sum()) / n
    return Choice(
        threshold=threshold,
        always=always,
        computed=n_computed,
        found=n_found,
        recall=n_found * n / held.n_fired if held.n_fired else 1.0,
        error=held.error(held.fired & ~computed),
        bytes=costs.predictor(rank, always, n_computed, n_found),
    )
