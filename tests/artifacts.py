"""Artifacts of small random checkpoints, without profiling or training: for tests of what reads or runs them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from powerinfer_tools.artifact import Artifact, split
from powerinfer_tools.artifact.layout import MODE_GATE, MODE_PREDICTOR, LayerPlan
from powerinfer_tools.checkpoint import Checkpoint, open_checkpoint
from powerinfer_tools.progress import silent


@dataclass
class DrawnActivations:
    """Firing counts drawn at random, as `split` asks for them."""

    checkpoint_digest: str
    n_layer: int
    n_ff: int
    thresholds: tuple[float, ...]
    path: Path = Path("drawn.activations")
    digest: str = "a" * 64
    n_tokens: int = 1000

    def counts(self, i: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng(i).integers(0, self.n_tokens + 1, self.n_ff)

    def order(self, i: int) -> npt.NDArray[np.int64]:
        return np.argsort(-self.counts(i), kind="stable")

    def frequency(self, i: int) -> npt.NDArray[np.float64]:
        return self.counts(i) / self.n_tokens


@dataclass
class DrawnPredictors:
    """The deciding rows themselves, at full rank, loosened by `slack`: a large one lets all through."""

    checkpoint: Checkpoint
    plans: list[LayerPlan]
    slack: float
    quant: str
    activations_digest: str = "a" * 64
    digest: str = "b" * 64
    path: Path = Path("drawn.predictors")
    relu: bool = False
    input: str = "ffn_input"
    figures: list[dict[str, Any]] = field(default_factory=list)

    def weights(self, i: int) -> tuple[npt.NDArray[np.float32], ...]:
        name = "ffn_gate" if self.checkpoint.config.gated else "ffn_up"
        select = self.checkpoint.read(f"blk.{i}.{name}.weight")
        rank = self.plans[i].rank
        u, s, v = np.linalg.svd(select, full_matrices=False)
        keep = min(rank, len(s))
        w_in = np.zeros((rank, select.shape[1]), np.float32)
        w_out = np.zeros((select.shape[0], rank), np.float32)
        w_in[:keep], w_out[:, :keep] = v[:keep], u[:, :keep] * s[:keep]
        bias = np.full(select.shape[0], self.slack, np.float32)
        if f"blk.{i}.{name}.bias" in self.checkpoint.names():
            bias += self.checkpoint.read(f"blk.{i}.{name}.bias")
        return w_in, w_out, bias


def make_artifact(folder: Path, output: Path, **how: Any) -> Artifact:
    """The artifact of the checkpoint in `folder`, as write_artifact makes it."""
    return write_artifact(open_checkpoint(folder), output, **how)


def write_artifact(
    checkpoint: Checkpoint,
    output: Path,
    *,
    quant: str = "f32",
    predictor: bool = False,
    rank: int = 128,
    always: int = 3,
    slack: float = 0.0,
    input: str = "ffn_input",
    thresholds: tuple[float, ...] | None = None,
) -> Artifact:
    """All layers in mode gate, or all in mode predictor. input: what the predictors read."""
    config = checkpoint.config
    thresholds = thresholds if thresholds is not None else config.thresholds
    activations = DrawnActivations(checkpoint.digest(), config.n_layer, config.n_ff, thresholds)
    plan = LayerPlan(MODE_PREDICTOR, rank, always) if predictor else LayerPlan(MODE_GATE)
    predictors = DrawnPredictors(checkpoint, [plan] * config.n_layer, slack, quant, input=input) if predictor else None
    return split(checkpoint, activations, output, predictors=predictors, quant=quant, force=True, progress=silent)  # type: ignore[arg-type]
