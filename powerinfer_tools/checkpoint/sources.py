"""Where our tensors come from: rows of theirs, with what is folded in as they are read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from powerinfer_tools.checkpoint.config import Config
from powerinfer_tools.checkpoint.source import FloatArray
from powerinfer_tools.checkpoint.tensors import Shapes
from powerinfer_tools.errors import PowerinferError

Rows = npt.NDArray[np.int64]
ReadRows = Callable[[str, Rows], FloatArray]  # these rows of their tensor, elements of a vector, as float32


@dataclass(frozen=True)
class Source:
    """One of our tensors. needs: their tensors that it is made of, each with its shape there; read: some of our rows,
    made of theirs; stored_as: their name, where their tensor is ours as it is; index: the places of our rows in theirs,
    where each is one of them in another order.
    """

    shape: tuple[int, ...]
    needs: Shapes
    read: Callable[[ReadRows, Rows], FloatArray]
    stored_as: str | None = None
    index: Callable[[Rows], Rows] | None = None


@dataclass(frozen=True)
class PredictorNames:
    """fc1 and fc2: names of a model's own predictors, with {i} for the layer; threshold: what a logit is to reach."""

    fc1: str
    fc2: str
    threshold: float

    def of(self, i: int) -> tuple[str, str]:
        return self.fc1.format(i=i), self.fc2.format(i=i)

    def all(self, n_layer: int) -> frozenset[str]:
        return frozenset(name for i in range(n_layer) for name in self.of(i))


@dataclass(frozen=True)
class Reading:
    """What a family makes of a checkpoint. unused: how names of tensors end that may be there beside the needed, each
    with what the user should know then; packed: the tensors of bytes, where all others are floats; predictors: those of
    the model's own, which it may have.
    """

    config: Config
    sources: Mapping[str, Source]
    unused: Mapping[str, str] = field(default_factory=dict)
    packed: frozenset[str] = frozenset()
    predictors: PredictorNames | None = None


def stored(name: str, shape: tuple[int, ...]) -> Source:
    """Their tensor as it is."""
    return Source(shape, {name: shape}, lambda read, rows: read(name, rows), name)


def picked(name: str, shape: tuple[int, ...], n: int, index: Callable[[Rows], Rows]) -> Source:
    """n rows of their tensor of this shape: ours at i is theirs at index(i)."""
    return Source((n, *shape[1:]), {name: shape}, lambda read, rows: read(name, index(rows)), index=index)


def folded(source: Source, fold: Callable[[FloatArray], FloatArray]) -> Source:
    """The source's rows, each changed by `fold`."""
    return Source(source.shape, source.needs, lambda read, rows: fold(source.read(read, rows)))


def check_stored(
    path: Path, sources: Mapping[str, Source], found: Shapes, unused: tuple[str, ...] = ()
) -> frozenset[str]:
    """The names of the tensors that the sources need.

    found: the shapes of all their tensors, [out, in]; unused: how those end that may be there all the same.
    Errors: a tensor that is missing, of another shape, or one that the configuration denies.
    """
    needed = {name: shape for source in sources.values() for name, shape in source.needs.items()}
    for name, shape in needed.items():
        if name not in found:
            raise PowerinferError(f"{path}: expected {name} {list(shape)}, found none", "mismatch")
        if found[name] != shape:
            raise PowerinferError(f"{path}: {name}: expected {list(shape)}, found {list(found[name])}", "mismatch")
    for name in found:
        if name not in needed and not name.endswith(unused):
            raise PowerinferError(f"{path}: {name}: expected no such tensor, found one", "unsupported")
    return frozenset(needed)
