"""train(): predictors for the layers where they save bytes, one layer at a time, to a .predictors file."""

import ctypes
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from powerinfer_tools.activations.file import Activations, apply
from powerinfer_tools.artifact.layout import INPUT_FFN, MODE_GATE, MODE_NAMES, MODE_PREDICTOR, QUANTS, LayerPlan
from powerinfer_tools.checkpoint.source import Checkpoint
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.files import Array, Table, read_table, write_table
from powerinfer_tools.predictors.file import KIND, Predictors, read_predictors
from powerinfer_tools.progress import Progress, default_progress
from powerinfer_tools.work import resumable

if TYPE_CHECKING:
    from powerinfer_tools.predictors.layer import Bounds, FittedLayer

LAYER_KIND = "trained layer"
PILOTS = 2  # layers on which both kinds of predictor are tried


def train(
    checkpoint: Checkpoint,
    activations: Activations,
    output: Path,
    *,
    recall: float = 0.98,
    error: float = 0.02,
    top1: float = 0.98,
    perplexity: float = 0.005,
    quant: str = "q4_0",
    seed: int = 0,
    force: bool = False,
    progress: Progress | None = None,
) -> Predictors:
    """Decides for each layer whether a predictor chooses its neurons or its gate rows do, and trains the predictors.

    On samples that were held out, a predictor finds at least `recall` of the neurons that fire, and those it misses
    change the layer's output by a relative squared error of at most `error`; within that it reads the fewest bytes a
    token. In the whole model they then leave at least `top1` of the tokens their likeliest next token and raise
    perplexity by at most the share `perplexity`: layers that change too much go back to gate mode, and `loss` says
    what the others change. Weights are rounded to `quant`. figures[i]: recall, precision, active (share that fires),
    predicted (share whose deciding row is read), rank, always, threshold, output_error, bytes_gate, bytes_predictor,
    mode; in mode gate they tell of the best predictor that was found. A killed run goes on at its last layer.
    Errors: the model is not exactly sparse; the profile is another checkpoint's; output exists without `force`.
    """
    from powerinfer_tools.predictors.layer import Bounds

    _check(checkpoint, activations, recall, error, top1, perplexity, quant)
    fingerprint = {
        "checkpoint": activations.checkpoint_digest,
        "activations": activations.digest,
        "recall": recall,
        "error": error,
        "top1": top1,
        "perplexity": perplexity,
        "quant": quant,
        "seed": seed,
        "device": _device(),
    }
    bounds = Bounds(recall, error, quant, seed)
    with resumable(output, fingerprint, force) as folder, default_progress(progress) as show:
        relu = _choose_kind(checkpoint, activations, bounds, folder, show)
        layers = []
        for i in range(activations.n_layer):
            layers.append(_fitted(checkpoint, activations, i, relu, bounds, folder))
            show("train, layers", i + 1, activations.n_layer)
        loss = _verified(checkpoint, activations, layers, relu, top1, perplexity, show)
        header = {
            "inputs": {"checkpoint": activations.checkpoint_digest, "activations": activations.digest},
            **{key: fingerprint[key] for key in ("recall", "error", "top1", "perplexity", "quant", "seed")},
            "relu": relu,
            "input": INPUT_FFN,
            "plans": [layer.header["plan"] for layer in layers],
            "figures": [layer.header["figures"] for layer in layers],
            "loss": loss,
        }
        write_table(output, KIND, header, _Arrays(layers), force)
    return read_predictors(output)


def _check(
    checkpoint: Checkpoint,
    activations: Activations,
    recall: float,
    error: float,
    top1: float,
    perplexity: float,
    quant: str,
) -> None:
    apply(activations, checkpoint)
    if activations.n_samples == 0:
        raise PowerinferError(
            f"{activations.path}: holds counts alone, no samples to train with; make others with: "
            f"powerinfer profile {checkpoint.path} --corpus FILE",
            "mismatch",
        )
    if not checkpoint.config.exactly_sparse:
        raise PowerinferError(
            f"{checkpoint.path}: {checkpoint.config.activation} is never exactly zero, so there is nothing to predict; "
            f"cut it: powerinfer profile {checkpoint.path} --sparsity 0.5 --corpus FILE",
            "unsupported",
        )
    if not 0 < recall <= 1:
        raise PowerinferError(f"recall: expected a share above 0 and up to 1, found {recall}", "usage")
    if not 0 <= top1 <= 1:
        raise PowerinferError(f"top1: expected a share from 0 to 1, found {top1}", "usage")
    for name, value in (("error", error), ("perplexity", perplexity)):
        if not value >= 0:
            raise PowerinferError(f"{name}: expected at least 0, found {value}", "usage")
    if quant not in QUANTS:
        raise PowerinferError(f"quant: expected one of {', '.join(QUANTS)}, found {quant}", "usage")


def _device() -> str:
    from torch import cuda

    return "cuda" if cuda.is_available() else "cpu"


def _choose_kind(
    checkpoint: Checkpoint, activations: Activations, bounds: "Bounds", folder: Path, show: Progress
) -> bool:
    """Whether predictors have a relu: the kind that reads fewer bytes over a few evenly spread layers."""
    n = activations.n_layer
    pilots = sorted({k * n // PILOTS + n // (2 * PILOTS) for k in range(min(n, PILOTS))})
    total = {False: 0.0, True: 0.0}
    for done, (i, relu) in enumerate((i, relu) for i in pilots for relu in total):
        total[relu] += _fitted(checkpoint, activations, i, relu, bounds, folder).header["bytes"]
        show("train, kinds tried", done + 1, 2 * len(pilots))
    return total[True] < total[False]


def _fitted(
    checkpoint: Checkpoint, activations: Activations, i: int, relu: bool, bounds: "Bounds", folder: Path
) -> Table:
    """The record of layer i with this kind of predictor, made now unless `folder` has it."""
    from powerinfer_tools.predictors.layer import fit_layer

    record = folder / f"{'relu' if relu else 'linear'}.{i}"
    if not record.exists():
        fitted = fit_layer(checkpoint, activations, i, relu, bounds, _device())
        header = {"plan": asdict(fitted.plan), "figures": fitted.figures, "bytes": fitted.bytes}
        write_table(record, LAYER_KIND, header, _arrays(fitted), force=True)
        del fitted
        _trim_heap()
    return read_table(record, LAYER_KIND)


def _trim_heap() -> None:
    """Gives free memory back to the system: what one layer's fitting leaves in the heap adds to the next one's peak."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc's
        libc.malloc_trim(0)


def _verified(
    checkpoint: Checkpoint,
    activations: Activations,
    layers: list[Table],
    relu: bool,
    top1: float,
    perplexity: float,
    show: Progress,
) -> dict[str, Any]:
    """What the predictors change in the whole model; layers that change too much become layers in gate mode."""
    import torch

    from powerinfer_tools.predictors.fit import Network
    from powerinfer_tools.predictors.verify import Screen, Tolerance, verify

    screens = {}
    for i, layer in enumerate(layers):
        if layer.header["plan"]["mode"] == MODE_PREDICTOR:
            w_in, w_out, bias = (torch.from_numpy(layer.arrays[part]).to(_device()) for part in ("in", "out", "bias"))
            always = torch.zeros(activations.n_ff, dtype=torch.bool, device=_device())
            always[torch.from_numpy(activations.order(i)[: layer.header["plan"]["always"]].copy())] = True
            screens[i] = Screen(Network(w_in, w_out, bias, relu), always)
    tokens = torch.from_numpy(activations.held_out()).long()
    kept, loss = verify(checkpoint, tokens, screens, Tolerance(top1, perplexity), show, _device())
    for i in screens.keys() - set(kept):
        layers[i].header["plan"] = asdict(LayerPlan(MODE_GATE))
        layers[i].header["figures"]["mode"] = MODE_NAMES[MODE_GATE]
    return asdict(loss) | {"dropped": sorted(screens.keys() - set(kept))}


def _arrays(fitted: "FittedLayer") -> dict[str, Array]:
    if fitted.network is None:
        return {}
    network = fitted.network
    tensors = {"in": network.w_in, "out": network.w_out, "bias": network.bias}
    return {name: tensor.cpu().numpy().astype(np.float32) for name, tensor in tensors.items()}


class _Arrays(Mapping[str, Array]):
    """The weights of all layers that have a predictor, read one at a time."""

    def __init__(self, layers: list[Table]) -> None:
        self._layers = layers

    def __getitem__(self, name: str) -> Array:
        what, layer = name.split(".")
        return self._layers[int(layer)].arrays[what]

    def __iter__(self) -> Iterator[str]:
        for i, layer in enumerate(self._layers):
            if layer.header["plan"]["mode"] == MODE_PREDICTOR:
                yield from (f"{what}.{i}" for what in layer.arrays)

    def __len__(self) -> int:
        return sum(1 for _ in self)
