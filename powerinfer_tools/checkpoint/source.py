"""The interface that every kind of checkpoint offers, and the choice between them."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from powerinfer_tools.checkpoint.config import Config
from powerinfer_tools.checkpoint.gguf_file import is_pwri
from powerinfer_tools.errors import PowerinferError

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class OwnPredictors:
    """Those that a model is published with: they read the stream, logits = fc2 . relu(fc1 . x).

    threshold: what a logit is to reach; ranks: one a layer; layer: fc1 [rank, n_embd] and fc2 [n_ff, rank] of one.
    """

    threshold: float
    ranks: list[int]
    layer: Callable[[int], tuple[FloatArray, FloatArray]]


class Checkpoint(ABC):
    """A model's weights, tokenizer and configuration; nothing is held but headers.

    path: the folder or file; config: sizes and choices; tokenizer_json: the text of a tokenizer.json;
    chat_template: jinja text or None; special: {"bos": id or None, "eos": [ids], "add_bos": bool, "bos_token": text,
    "eos_token": text}, the texts for templates;
    metadata: name, license and the like for the artifact; notes: what a user should know about how it was read;
    predictors: the model's own, where it has some.
    """

    path: Path
    config: Config
    tokenizer_json: str
    chat_template: str | None
    special: dict[str, Any]
    metadata: dict[str, str]
    notes: list[str]
    predictors: OwnPredictors | None = None

    @abstractmethod
    def names(self) -> frozenset[str]:
        """Names of all tensors, as in artifact.layout, one for each matrix."""

    @abstractmethod
    def read(self, name: str, rows: slice | None = None) -> FloatArray:
        """One tensor as float32, or only some of its rows. Errors: no such tensor, wrong shape, unreadable type."""

    def stored(self, name: str, type: str, rows: slice) -> npt.NDArray[np.uint8] | None:
        """Rows of a matrix as the files have them, uint8 [rows, bytes of a row], where they have them in `type`, a key
        of artifact.layout.BLOCK; else None: they are to be read. blk.N.ffn_down_t.weight is ffn_down, a row a neuron.
        """
        return None

    def head_type(self, quant: str) -> str | None:
        """The type that output.weight keeps in an artifact of type `quant`; None: that one."""
        return None

    @abstractmethod
    def digest(self) -> str:
        """SHA-256 over config and all weight bytes: what the files made from this checkpoint record."""

    @property
    def inputs(self) -> dict[str, str]:
        """Digests of what the checkpoint was put together from, by kind; none for one that others publish."""
        return {}

    @property
    def biases(self) -> frozenset[str]:
        """The bias tensors, for artifact.layout.tensor_table."""
        return frozenset(name for name in self.names() if name.endswith(".bias"))


def check_rows(path: Path, shapes: dict[str, tuple[int, ...]], name: str, rows: slice | None) -> tuple[int, int]:
    """The rows [begin, end) that `read` was asked for. Errors: no such tensor."""
    if name not in shapes:
        raise PowerinferError(f"{path}: expected the tensor {name}, found none", "mismatch")
    begin, end, step = (rows or slice(None)).indices(shapes[name][0])
    if step != 1:
        raise ValueError(f"{name}: rows are read in order, one by one, not with step {step}")
    return begin, max(begin, end)


def check_finite(name: str, array: FloatArray, first_row: int = 0) -> None:
    """Errors: a weight that is not a finite number, named with its index; the array begins at row first_row."""
    finite = np.isfinite(array)
    if not finite.all():
        index = [int(i) for i in np.unravel_index(int(np.argmin(finite)), array.shape)]
        found = array[tuple(index)]
        index[0] += first_row
        raise PowerinferError(f"{name}: expected finite weights, found {found} at {index}", "malformed")


def open_checkpoint(path: Path, activation: str | None = None, patch: Path | None = None) -> Checkpoint:
    """Opens a Hugging Face folder, a GGUF file or one of the first PowerInfer, with what `patch` changes of it.

    `activation` answers for files that do not record it (GGUF).
    """
    if patch is not None:
        from powerinfer_tools.checkpoint.patch import merge

        return merge(open_checkpoint(path, activation), patch)
    if path.is_dir():
        from powerinfer_tools.checkpoint.huggingface import HuggingFaceCheckpoint

        return HuggingFaceCheckpoint(path, activation)
    if path.is_file():
        from powerinfer_tools.checkpoint.gguf_checkpoint import GgufCheckpoint
        from powerinfer_tools.checkpoint.pwri_checkpoint import PwriCheckpoint

        return (PwriCheckpoint if is_pwri(path) else GgufCheckpoint)(path, activation)
    raise PowerinferError(f"{path}: expected a checkpoint folder or a GGUF file, found nothing there", "usage")
