"""Predictors that are part of a published model: in a model file of the first PowerInfer, or in a folder's tensors."""

from pathlib import Path

import numpy as np

from powerinfer_tools.checkpoint.config import Config
from powerinfer_tools.checkpoint.source import FloatArray, OwnPredictors, check_finite
from powerinfer_tools.checkpoint.sources import PredictorNames, ReadRows
from powerinfer_tools.checkpoint.tensors import Shapes
from powerinfer_tools.errors import PowerinferError


def own_predictors(path: Path, names: PredictorNames, found: Shapes, config: Config, read: ReadRows) -> OwnPredictors:
    """The predictors of all layers, read one at a time. found: the shapes of all their tensors, [out, in].

    Errors: a layer has none, or one of other sizes than the layer's.
    """

    def layer(i: int) -> tuple[FloatArray, FloatArray]:
        fc1, fc2 = (read(name, np.arange(found[name][0])) for name in names.of(i))
        for name, matrix in zip(names.of(i), (fc1, fc2), strict=True):
            check_finite(f"{path}: {name}", matrix)
        return fc1, fc2

    return OwnPredictors(
        names.threshold, [_rank(path, names.of(i), found, config) for i in range(config.n_layer)], layer
    )


def _rank(path: Path, names: tuple[str, str], found: Shapes, config: Config) -> int:
    for name in names:
        if name not in found:
            raise PowerinferError(f"{path}: expected {name}, half of a predictor, found none", "mismatch")
    fc1, fc2 = (found[name] for name in names)
    rank = (*fc1, 0)[0]
    if not rank or (fc1, fc2) != ((rank, config.n_embd), (config.n_ff, rank)):
        expected = f"[rank, {config.n_embd}] and [{config.n_ff}, rank]"
        shapes = f"{list(fc1)} and {list(fc2)}"
        raise PowerinferError(f"{path}: {' and '.join(names)}: expected {expected}, found {shapes}", "mismatch")
    return rank
