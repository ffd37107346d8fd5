"""The predictors themselves: a start from the select matrix, fine-tuning, rounding."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from powerinfer_tools.artifact.layout import matrix_type

RIDGE = 1e-3  # of the mean variance of an input dimension
BLOCK_ROWS = 1024  # neurons that are worked on at once, where temporaries are several times their size
CALIBRATION_STEPS, CALIBRATION_TOKENS = 6, 1024
STEPS, BATCH, ROUND_EVERY, LOOK_EVERY = 300, 512, 4, 50
LEARNING_RATE = 0.01  # of a weight matrix's mean size
POSITIVE_WEIGHT = 3.0  # a missed neuron costs more than one computed in vain
PATIENCE = 2  # looks without a gain
EARLY = 100  # steps after which the rest can be foreseen


@dataclass(frozen=True)
class Network:
    """logits = w_out . a(w_in . x) + bias, a = relu or nothing; w_in [rank, n_embd], w_out [n_ff, rank]."""

    w_in: Tensor
    w_out: Tensor
    bias: Tensor
    relu: bool

    @property
    def rank(self) -> int:
        return len(self.w_in)

    def logits(self, x: Tensor) -> Tensor:
        """[n, n_embd] -> [n, n_ff]."""
        return self.hidden(x) @ self.w_out.T + self.bias

    def hidden(self, x: Tensor) -> Tensor:
        """[n, n_embd] -> [n, rank]."""
        z = x @ self.w_in.T
        return z.relu_() if self.relu else z

    def stored(self, quant: str, x: Tensor, fired: Tensor) -> "Network":
        """The same as an artifact of type `quant` stores it: rounded, then each neuron's logit calibrated anew.

        Rounding is blind to scale, so calibrating costs nothing and mends most of what rounding broke.
        """
        w_in, w_out = rounded(self.w_in, quant), rounded(self.w_out, quant)
        x, fired = _thinned(x, fired)
        forecast = Network(w_in, w_out, torch.zeros_like(self.bias), self.relu).logits(x)
        scale, shift = _calibrate(forecast, fired)
        return Network(w_in, rounded(w_out * scale[:, None], quant), shift, self.relu)


def rounded(weights: Tensor, quant: str) -> Tensor:
    """A matrix as it is after being stored in the type that its rows get."""
    from gguf import GGMLQuantizationType, quants

    type = GGMLQuantizationType[matrix_type(quant, weights.shape[1]).upper()]
    stored = quants.dequantize(quants.quantize(weights.detach().cpu().numpy(), type), type)
    return torch.from_numpy(np.ascontiguousarray(stored, dtype=np.float32)).to(weights.device)


class Start:
    """The best low-rank forecast of the select rows on the sampled inputs, for any rank.

    The truncated SVD of G C^1/2 minimises E |G (x - mean) - W_out W_in (x - mean)|^2, C the inputs' covariance plus
    a ridge (data-aware SVD, as in SVD-LLM, arXiv 2403.07378, section 3). Rows of G count equally: each is scaled to
    unit variance, since only the sign of (pre-activation - threshold) matters. Consumes `select`.
    """

    def __init__(self, select: Tensor, x: Tensor) -> None:
        self._mean = x.mean(0)
        values, vectors = torch.linalg.eigh(_covariance(x - self._mean).double())
        root = (vectors * values.sqrt()) @ vectors.T
        self._inverse_root = ((vectors / values.sqrt()) @ vectors.T).float()
        del vectors  # float64, n_embd squared: what follows takes several of these, and a decomposition yet more
        self._weighted = select  # overwritten: nobody needs it again, and it is a third of the layer
        gram = torch.zeros_like(root)
        for begin in range(0, len(select), BLOCK_ROWS):  # in float64 only so much at a time
            rows = slice(begin, begin + BLOCK_ROWS)
            weighted = select[rows].double() @ root
            weighted /= weighted.norm(dim=1, keepdim=True).clamp_min(1e-12)
            gram += weighted.T @ weighted
            self._weighted[rows] = weighted.float()
        del root
        _, directions = torch.linalg.eigh(gram)
        self._directions = directions.flip(1).float()  # [n_embd, n_embd], strongest first

    def network(self, rank: int, relu: bool, x: Tensor, fired: Tensor) -> Network:
        """A predictor of this rank. relu: half as many directions, each with both signs: z = relu(z) - relu(-z).

        Each neuron's logit is a * forecast + b, fitted to whether it fired.
        """
        directions = self._directions[:, : rank // 2 if relu else rank]
        w_in = directions.T @ self._inverse_root
        w_out = self._weighted @ directions
        x, fired = _thinned(x, fired)
        scale, shift = _calibrate((x - self._mean) @ w_in.T @ w_out.T, fired)
        w_out *= scale[:, None]
        bias = shift - w_out @ (w_in @ self._mean)
        sizes = w_out.norm(dim=0)  # columns of equal size lose least in a block's shared scale
        w_in, w_out = w_in * sizes[:, None], w_out / sizes
        if relu:
            w_in, w_out = torch.cat([w_in, -w_in]), torch.cat([w_out, -w_out], dim=1)
        return Network(w_in, w_out, bias, relu)


def _covariance(centred: Tensor) -> Tensor:
    """[n, n_embd] -> [n_embd, n_embd], with the ridge."""
    covariance = centred.T @ centred / len(centred)
    covariance += RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance), device=centred.device)
    return covariance


def _thinned(x: Tensor, fired: Tensor) -> tuple[Tensor, Tensor]:
    """Evenly spread samples, as many as a calibration of two numbers a neuron needs."""
    step = max(1, len(x) // CALIBRATION_TOKENS)
    return x[::step], fired[::step]


def _calibrate(forecast: Tensor, fired: Tensor) -> tuple[Tensor, Tensor]:
    """Logistic regression of each neuron's firing on its forecast, by Newton's method: scale and shift [n_ff]."""
    n_ff = forecast.shape[1]
    blocks = [slice(begin, begin + BLOCK_ROWS) for begin in range(0, n_ff, BLOCK_ROWS)]
    pairs = [_calibrate_block(forecast[:, block], fired[:, block]) for block in blocks]
    return torch.cat([scale for scale, _ in pairs]), torch.cat([shift for _, shift in pairs])


def _calibrate_block(forecast: Tensor, fired: Tensor) -> tuple[Tensor, Tensor]:
    """The same for all of these neurons at once."""
    mean, size = forecast.mean(0), forecast.std(0).clamp_min(1e-6)
    f, y = (forecast - mean) / size, fired.float()
    frequency = (y.mean(0) + 1 / len(f)) / (1 + 2 / len(f))
    scale, shift = torch.ones_like(frequency), frequency.logit()
    for _ in range(CALIBRATION_STEPS):
        p = torch.sigmoid(f * scale + shift)
        w, error = p * (1 - p), y - p
        wf = w * f
        # a prior of one observation keeps neurons that always or never fired finite
        a, b, c = (wf * f).sum(0) + 1, wf.sum(0), w.sum(0) + 1
        of_scale = (error * f).sum(0) - (scale - 1)
        of_shift = error.sum(0) - (shift - frequency.logit())
        determinant = a * c - b * b
        scale = scale + ((c * of_scale - b * of_shift) / determinant).clamp(-2, 2)
        shift = shift + ((a * of_shift - b * of_scale) / determinant).clamp(-2, 2)
    return scale / size, shift - scale / size * mean


def fine_tune(
    start: Network,
    x: Tensor,
    fired: Tensor,
    quant: str,
    judge: Callable[[Network], float],
    hopeless: float,
    generator: torch.Generator,
) -> Network:
    """The best stored network of a few hundred Adam steps on recall-weighted cross-entropy, by what `judge` asks less.

    The weights see their rounding error, refreshed every ROUND_EVERY steps. Every LOOK_EVERY steps `judge` says what
    the stored network costs; training stops when that has not fallen PATIENCE times, or is above `hopeless` after
    EARLY steps.
    """
    weights = [start.w_in.clone(), start.w_out.clone(), start.bias.clone()]
    sizes = [float(weights[0].abs().mean()), float(weights[1].abs().mean()), 1.0]
    groups = [{"params": [w], "lr": LEARNING_RATE * s} for w, s in zip(weights, sizes, strict=True)]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (STEPS + 1))
    best, lowest, waited = start, float("inf"), 0
    for step in range(STEPS + 1):
        if step % LOOK_EVERY == 0:
            network = Network(weights[0], weights[1], weights[2], start.relu).stored(quant, x, fired)
            cost = judge(network)
            waited = 0 if cost < lowest else waited + 1
            if cost < lowest:
                best, lowest = network, cost
            if waited == PATIENCE or step == STEPS or (step >= EARLY and lowest > hopeless):
                break
        if step % ROUND_EVERY == 0:
            errors = [rounded(w, quant) - w for w in weights[:2]]
        chosen = torch.randint(len(x), (min(BATCH, len(x)),), generator=generator).to(x.device)
        seen = Network(weights[0] + errors[0], weights[1] + errors[1], weights[2], start.relu)
        for w, gradient in zip(weights, _gradients(seen, x[chosen], fired[chosen].float()), strict=True):
            w.grad = gradient
        optimizer.step()
        schedule.step()
    return best


def _gradients(network: Network, x: Tensor, fired: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the recall-weighted cross-entropy to w_in, w_out and bias, written out: the loss itself is never needed."""
    z = network.hidden(x)
    pull = torch.sigmoid(torch.addmm(network.bias, z, network.w_out.T)) - fired
    pull.addcmul_(pull, fired, value=POSITIVE_WEIGHT - 1).div_(len(x))
    to_hidden = pull @ network.w_out
    if network.relu:
        to_hidden *= z > 0
    return to_hidden.T @ x, pull.T @ z, pull.sum(0)
