"""Predictors that others trained: fc1 and fc2 of each layer, a model's own or the first PowerInfer's model_N.pt.

logits = fc2 . relu(fc1 . x), x = what the FFN's norm takes; a neuron is let through where its logit reaches the
threshold, one for all layers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from powerinfer_tools.activations.file import Activations, apply
from powerinfer_tools.artifact.layout import INPUT_STREAM, MODE_NAMES, MODE_PREDICTOR, LayerPlan
from powerinfer_tools.checkpoint import Checkpoint, Config, open_checkpoint
from powerinfer_tools.checkpoint.fields import Fields, read_json
from powerinfer_tools.checkpoint.source import OwnPredictors
from powerinfer_tools.checkpoint.torch_file import array_of, read_torch
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.files import Array, sha256_bytes, sha256_file, write_table
from powerinfer_tools.predictors.file import KIND, FloatArray, Predictors, read_predictors

CONFIG_LIMIT = 1 << 20
MAX_RANK = 1 << 14


@dataclass(frozen=True)
class Pretrained:
    """digest: of the files that the predictors come from."""

    digest: str
    predictors: OwnPredictors


def open_pretrained(source: Path, checkpoint: Checkpoint) -> Pretrained:
    """The predictors of `source`, for the model of `checkpoint`: itself, a PWRI file or a folder of model_N.pt.

    Errors: a layer's is missing; other sizes.
    """
    config = checkpoint.config
    own = source == checkpoint.path and checkpoint.predictors is not None
    if source.is_dir() and not own:
        return _open_folder(source, config)
    found = checkpoint if own else open_checkpoint(source)
    if found.predictors is None:
        expected = "expected a model file of the first PowerInfer or a folder of model_N.pt"
        raise PowerinferError(f"{source}: {expected}, found another checkpoint", "mismatch")
    sizes, others = ((c.n_layer, c.n_embd, c.n_ff) for c in (config, found.config))
    if sizes != others:
        raise PowerinferError(f"{source}: expected layers, n_embd and n_ff {sizes}, found {others}", "mismatch")
    return Pretrained(found.digest(), found.predictors)


def take_predictors(
    checkpoint: Checkpoint,
    activations: Activations,
    pretrained: Pretrained,
    output: Path,
    *,
    quant: str = "q4_0",
    force: bool = False,
) -> Predictors:
    """Writes these predictors as they are, for the model of `checkpoint`; `activations` order its neurons.

    Every layer is in mode predictor and nothing is measured: `powerinfer eval` tells what they find and cost.
    """
    apply(activations, checkpoint)
    config = checkpoint.config
    if not config.exactly_sparse:
        raise PowerinferError(
            f"{checkpoint.path}: {config.activation} is never exactly zero: a predictor made for ReLU is of no use",
            "unsupported",
        )
    predictors = pretrained.predictors
    plans = [LayerPlan(MODE_PREDICTOR, rank) for rank in predictors.ranks]
    header = {
        "inputs": {
            "checkpoint": activations.checkpoint_digest,
            "activations": activations.digest,
            "pretrained": pretrained.digest,
        },
        "quant": quant,
        "relu": True,
        "input": INPUT_STREAM,
        "plans": [asdict(plan) for plan in plans],
        "figures": [_figures(i, plan, predictors.threshold) for i, plan in enumerate(plans)],
        "loss": {"dropped": []},
    }
    write_table(output, KIND, header, _Arrays(predictors, config), force)
    return read_predictors(output)


def _figures(i: int, plan: LayerPlan, threshold: float) -> dict[str, int | float | str]:
    mode = MODE_NAMES[plan.mode]
    return {"layer": i, "mode": mode, "rank": plan.rank, "always": plan.always, "threshold": threshold}


def _open_folder(folder: Path, config: Config) -> Pretrained:
    """Layer i is in model_<i>.pt; config.json may give the threshold."""
    paths = [folder / f"model_{i}.pt" for i in range(config.n_layer)]
    for i, path in enumerate(paths):
        if not path.is_file():
            raise PowerinferError(f"{path}: expected the predictor of layer {i}, found no such file", "mismatch")
    if (beyond := folder / f"model_{config.n_layer}.pt").exists():
        raise PowerinferError(f"{beyond}: expected predictors of {config.n_layer} layers, found more", "mismatch")
    digests = [sha256_file(path) for path in paths]
    settings = folder / "config.json"
    threshold = 0.0
    if settings.is_file():
        fields = Fields(str(settings), read_json(settings, CONFIG_LIMIT))
        threshold = fields.number("sparse_threshold", 0.0, low=-1e12)

    def layer(i: int) -> tuple[FloatArray, FloatArray]:
        return _read_layer(paths[i], config)

    ranks = [len(layer(i)[0]) for i in range(config.n_layer)]
    digest = sha256_bytes(f"{threshold} {digests}".encode())
    return Pretrained(digest, OwnPredictors(threshold, ranks, layer))


def _read_layer(path: Path, config: Config) -> tuple[FloatArray, FloatArray]:
    state = read_torch(path, 4 * MAX_RANK * (config.n_embd + config.n_ff))
    if not isinstance(state, dict) or set(state) != {"fc1.weight", "fc2.weight"}:
        found = ", ".join(map(str, list(state)[:4])) if isinstance(state, dict) else type(state).__name__
        raise PowerinferError(f"{path}: expected fc1.weight and fc2.weight, found {found}", "mismatch")
    shape: tuple[int, ...] = tuple(getattr(state["fc1.weight"], "shape", ()))
    rank = shape[0] if len(shape) == 2 else 1
    if not 1 <= rank <= MAX_RANK:
        raise PowerinferError(f"{path}: fc1.weight: expected 1 to {MAX_RANK} rows, found {rank}", "mismatch")
    fc1 = array_of(path, "fc1.weight", state["fc1.weight"], (rank, config.n_embd))
    fc2 = array_of(path, "fc2.weight", state["fc2.weight"], (config.n_ff, rank))
    return fc1.astype(np.float32), fc2.astype(np.float32)


class _Arrays(Mapping[str, Array]):
    """in, out and bias of all layers, read one at a time; the last one stays at hand."""

    def __init__(self, predictors: OwnPredictors, config: Config) -> None:
        self._bias = np.full(config.n_ff, -predictors.threshold, np.float32)
        self._layer, self._n_layer = lru_cache(maxsize=1)(predictors.layer), config.n_layer

    def __getitem__(self, name: str) -> Array:
        what, i = name.split(".")
        if what == "bias":
            return self._bias
        return self._layer(int(i))[("in", "out").index(what)]

    def __iter__(self) -> Iterator[str]:
        return (f"{what}.{i}" for i in range(self._n_layer) for what in ("in", "out", "bias"))

    def __len__(self) -> int:
        return 3 * self._n_layer
