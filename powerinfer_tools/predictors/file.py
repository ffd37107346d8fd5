"""The .predictors file: how each layer's neurons are to be chosen, read lazily."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from powerinfer_tools.artifact.layout import INPUT_FFN, MODE_PREDICTOR, LayerPlan
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.files import Table, read_table

KIND = "predictors"
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Predictors:
    """One plan a layer, and for layers in mode predictor its weights.

    relu: logits = w_out . relu(w_in . x) + bias, else w_out . (w_in . x) + bias; input: what x is, one of
    layout.PREDICTOR_INPUTS; quant: the type that the weights are rounded to; figures: what was measured of each layer
    on held-out samples, as `train` describes it; loss: what they change in the whole model on held-out windows: tokens,
    top1 (share that keeps its likeliest next token), perplexity (relative rise), dropped (layers that changed too much
    and were put in gate mode).
    """

    path: Path
    digest: str
    checkpoint_digest: str
    activations_digest: str
    relu: bool
    input: str
    quant: str
    plans: list[LayerPlan]
    figures: list[dict[str, Any]]
    loss: dict[str, Any]
    header: dict[str, Any] = field(repr=False)
    _table: Table = field(repr=False)

    def weights(self, layer: int) -> tuple[FloatArray, FloatArray, FloatArray]:
        """w_in [rank, n_embd], w_out [n_ff, rank], bias [n_ff], in the checkpoint's neuron order.

        A neuron is let through where its logit is >= 0: the threshold is taken off the bias already.
        Error: the layer's mode is not predictor.
        """
        if self.plans[layer].mode != MODE_PREDICTOR:
            raise PowerinferError(f"{self.path}: layer {layer} runs in gate mode and has no predictor", "mismatch")
        arrays = self._table.arrays
        return arrays[f"in.{layer}"], arrays[f"out.{layer}"], arrays[f"bias.{layer}"]


def read_predictors(path: Path) -> Predictors:
    """The predictors at `path`. Errors: not a file of this kind, or of a newer format."""
    table = read_table(path, KIND)
    header = table.header
    return Predictors(
        path=path,
        digest=table.digest,
        checkpoint_digest=header["inputs"]["checkpoint"],
        activations_digest=header["inputs"]["activations"],
        relu=header["relu"],
        input=header.get("input", INPUT_FFN),  # older files do not say
        quant=header["quant"],
        plans=[LayerPlan(**plan) for plan in header["plans"]],
        figures=header["figures"],
        loss=header["loss"],
        header=header,
        _table=table,
    )
