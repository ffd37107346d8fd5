"""One layer's choice: gate or predictor, of which rank, by bytes per token on held-out samples."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from powerinfer_tools import reference
from powerinfer_tools.activations.file import HELD_OUT_EVERY, Activations
from powerinfer_tools.artifact.layout import MODE_GATE, MODE_NAMES, MODE_PREDICTOR, LayerPlan
from powerinfer_tools.checkpoint.source import Checkpoint
from powerinfer_tools.predictors.choose import Choice, HeldOut, choose
from powerinfer_tools.predictors.fit import Network, Start, fine_tune
from powerinfer_tools.predictors.select import FfnCosts

MARGIN = 0.03  # a predictor must save this share of the gate mode's bytes
HOPELESS = 1.02  # of the bytes that would pay: fine-tuning that starts worse is given up early
RANK_STEP = 32  # a block of the quantised types


@dataclass(frozen=True)
class Bounds:
    """What is asked of every predictor: least recall, largest relative output error, the type it is stored in."""

    recall: float
    error: float
    quant: str
    seed: int


@dataclass(frozen=True)
class FittedLayer:
    """A layer's plan and figures; network is None in mode gate, threshold already off its bias else."""

    plan: LayerPlan
    figures: dict[str, Any]
    network: Network | None

    @property
    def bytes(self) -> float:
        """Bytes a token reads in this layer's FFN by the plan."""
        key = "bytes_predictor" if self.plan.mode == MODE_PREDICTOR else "bytes_gate"
        return float(self.figures[key])


@dataclass(frozen=True)
class Samples:
    """A layer's profile, split into windows to fit to and windows to judge by."""

    x: Tensor  # [n, n_embd]
    fired: Tensor  # bool [n, n_ff], as if all experts were chosen
    held: HeldOut
    select: Tensor  # [n_ff, n_embd]


def fit_layer(
    checkpoint: Checkpoint, activations: Activations, i: int, relu: bool, bounds: Bounds, device: str
) -> FittedLayer:
    """The cheaper of gate mode and the best predictor found for layer i."""
    samples = _samples(checkpoint, activations, i, device)
    costs = FfnCosts.of(checkpoint.config, bounds.quant)
    gate_bytes = costs.gate(samples.held.n_fired / len(samples.held.x))
    target = (1 - MARGIN) * gate_bytes
    network, choice = _best_start(samples, relu, bounds, costs, target)
    if costs.least(network.rank, samples.held.n_fired / len(samples.held.x)) <= target:
        network, choice = _tuned(network, samples, bounds, costs, target, i)
    pays = choice.bytes <= target
    plan = LayerPlan(MODE_PREDICTOR, network.rank, choice.always) if pays else LayerPlan(MODE_GATE)
    figures = _figures(i, plan, network.rank, choice, samples.held, gate_bytes)
    if not pays:
        return FittedLayer(plan, figures, None)
    biased = Network(network.w_in, network.w_out, network.bias - choice.threshold, relu)
    return FittedLayer(plan, figures, biased)


def _samples(checkpoint: Checkpoint, activations: Activations, i: int, device: str) -> Samples:
    ffn = reference.load_ffn(checkpoint, i, device)
    x = torch.from_numpy(activations.inputs(i)).to(device).float()
    fired = torch.from_numpy(activations.active(i)).to(device)
    held = _held_out(activations).to(device)
    order = torch.from_numpy(activations.order(i)).to(device)
    select = ffn.up if ffn.gate is None else ffn.gate
    fires, routes, candidates = fired[~held], None, None
    with torch.inference_mode():
        if checkpoint.config.experts is not None:
            fires = ffn.neurons(x[~held]) != 0  # whether or not it is routed to: the router says that exactly
            routes = torch.from_numpy(activations.routes(i)).to(device)[held]
            candidates = ffn.each(routes) > 0
        h = ffn.neurons(x[held], routes)
    return Samples(x[~held], fires, HeldOut(x[held], fired[held], h, ffn.down.T, order, candidates), select)


def _held_out(activations: Activations) -> Tensor:
    """Which samples are judged by, bool [n_samples]: those of every fifth window, as neighbours are alike."""
    windows = torch.from_numpy(activations.positions()) // activations.window
    if int(windows[-1]) < HELD_OUT_EVERY:
        windows = torch.arange(len(windows))  # too few windows: every fifth sample
    return windows % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


def _best_start(samples: Samples, relu: bool, bounds: Bounds, costs: FfnCosts, target: float) -> tuple[Network, Choice]:
    """The SVD start that reads the fewest bytes, among the ranks that could pay: doubled, then between the best two."""
    svd = Start(samples.select, samples.x)
    fired = samples.held.n_fired / len(samples.held.x)
    tried: dict[int, tuple[Network, Choice]] = {}

    def attempt(rank: int) -> None:
        network = svd.network(rank, relu, samples.x, samples.fired)
        network = network.stored(bounds.quant, samples.x, samples.fired)
        tried[rank] = network, choose(network, samples.held, costs, bounds.recall, bounds.error)

    def best() -> int:
        return min(tried, key=lambda rank: tried[rank][1].bytes)

    rank = RANK_STEP
    attempt(rank)
    while 2 * (rank := 2 * rank) <= costs.n_embd and costs.least(rank, fired) < min(target, tried[best()][1].bytes):
        attempt(rank)
    for between in (best() * 3 // 4, best() * 3 // 2):
        if between % RANK_STEP == 0 and between < max(tried) and between not in tried:
            attempt(between)
    return tried[best()]


def _tuned(
    network: Network, samples: Samples, bounds: Bounds, costs: FfnCosts, target: float, i: int
) -> tuple[Network, Choice]:
    held = samples.held

    def judge(candidate: Network) -> float:
        return choose(candidate, held, costs, bounds.recall, bounds.error).bytes

    generator = torch.Generator().manual_seed(bounds.seed * 100_003 + i)
    hopeless = HOPELESS * target
    tuned = fine_tune(network, samples.x, samples.fired, bounds.quant, judge, hopeless, generator)
    return tuned, choose(tuned, held, costs, bounds.recall, bounds.error)


def _figures(i: int, plan: LayerPlan, rank: int, choice: Choice, held: HeldOut, gate_bytes: float) -> dict[str, Any]:
    """Of the predictor, whether the plan takes it or not."""
    n_ff = held.fired.shape[1]
    return {
        "layer": i,
        "mode": MODE_NAMES[plan.mode],
        "recall": choice.recall,
        "precision": choice.found / choice.computed if choice.computed else 1.0,
        "active": held.n_fired / held.fired.numel(),
        "predicted": choice.computed / n_ff,
        "rank": rank,
        "always": choice.always,
        "threshold": choice.threshold,
        "output_error": choice.error,
        "bytes_gate": gate_bytes,
        "bytes_predictor": choice.bytes,
    }
