"""The .activations file: what a profile found, read lazily."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from powerinfer_tools.checkpoint.source import Checkpoint
from powerinfer_tools.files import Table, read_table, require_same

KIND = "activations"
HELD_OUT_EVERY = 5  # every fifth window is for judging predictors, not for fitting them


@dataclass(frozen=True)
class Activations:
    """Firing counts of every neuron and a sample of FFN inputs; neurons are in the checkpoint's order.

    n_tokens: calibration tokens counted; n_samples: those of them whose inputs are kept, the same in every layer;
    thresholds: one activation threshold a layer, 0 where the model was not cut.
    """

    path: Path
    digest: str
    checkpoint_digest: str
    n_layer: int
    n_embd: int
    n_ff: int
    n_tokens: int
    n_samples: int
    window: int
    thresholds: tuple[float, ...]
    header: dict[str, Any] = field(repr=False)
    _table: Table = field(repr=False)

    def counts(self, layer: int) -> npt.NDArray[np.int64]:
        """How many calibration tokens fired each neuron: int64 [n_ff]."""
        return self._table.arrays[f"counts.{layer}"]

    def frequency(self, layer: int) -> npt.NDArray[np.float64]:
        """The share of calibration tokens that fired each neuron: float64 [n_ff]."""
        return self.counts(layer) / float(self.n_tokens)

    def order(self, layer: int) -> npt.NDArray[np.int64]:
        """The stored order, falling count and ties by index: int64 [n_ff], the checkpoint's index of each."""
        return np.argsort(-self.counts(layer), kind="stable")

    def positions(self) -> npt.NDArray[np.int64]:
        """The sampled tokens' places among the calibration tokens, rising: int64 [n_samples]."""
        return self._table.arrays["positions"]

    def held_out(self) -> npt.NDArray[np.int32]:
        """Windows of tokens by which predictors are judged in the end: int32 [n, window]."""
        return self._table.arrays["held_out"]

    def inputs(self, layer: int) -> npt.NDArray[np.float16]:
        """The sampled normalised FFN inputs: float16 [n_samples, n_embd]."""
        return self._table.arrays[f"inputs.{layer}"]

    def active(self, layer: int) -> npt.NDArray[np.bool_]:
        """Which neurons each sampled token fired: bool [n_samples, n_ff]."""
        packed = self._table.arrays[f"active.{layer}"]
        return np.unpackbits(packed, axis=1, count=self.n_ff).astype(np.bool_)

    def routes(self, layer: int) -> npt.NDArray[np.float32]:
        """The experts' weights for each sampled token, 0 for those not chosen: float32 [n_samples, n_experts]."""
        return self._table.arrays[f"routes.{layer}"]


def read_activations(path: Path) -> Activations:
    """The profile at `path`. Errors: not a file of this kind, or of a newer format."""
    table = read_table(path, KIND)
    header = table.header
    return Activations(
        path=path,
        digest=table.digest,
        checkpoint_digest=header["inputs"]["checkpoint"],
        n_layer=header["n_layer"],
        n_embd=header["n_embd"],
        n_ff=header["n_ff"],
        n_tokens=header["n_tokens"],
        n_samples=header["n_samples"],
        window=header["window"],
        thresholds=tuple(header["thresholds"]),
        header=header,
        _table=table,
    )


def apply(activations: Activations, checkpoint: Checkpoint) -> None:
    """Makes `checkpoint` the model that was profiled: its config gets the profile's thresholds.

    Error: the profile was made from another checkpoint.
    """
    remedy = f"make one with: powerinfer profile {checkpoint.path} --corpus FILE"
    require_same("checkpoint", activations.path, checkpoint.digest(), activations.checkpoint_digest, remedy)
    checkpoint.config = checkpoint.config.with_thresholds(activations.thresholds)
