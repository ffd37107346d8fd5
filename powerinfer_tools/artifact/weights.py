"""What the artifact's tensors hold: the checkpoint's weights in stored order, bundled and quantised, block by block."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from powerinfer_tools.artifact.layout import BLOCK, MODE_GATE, TYPE_ID, LayerPlan, TensorPlan
from powerinfer_tools.checkpoint.config import Config
from powerinfer_tools.checkpoint.source import Checkpoint
from powerinfer_tools.errors import PowerinferError

if TYPE_CHECKING:
    from powerinfer_tools.activations import Activations
    from powerinfer_tools.predictors import Predictors

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]

BLOCK_ELEMENTS = 1 << 22  # numbers quantised at a time: 16 MiB of float32
_MAX_FLOAT16 = 65504.0  # also bounds the scales of quantised blocks


@dataclass(frozen=True)
class Weights:
    """The sources of one artifact. Holds no weights: each tensor is read when its blocks are asked for."""

    checkpoint: Checkpoint
    activations: "Activations"
    predictors: "Predictors | None"
    plans: list[LayerPlan]

    def blocks(self, plan: TensorPlan) -> Iterator[Array]:
        """The tensor's bytes, in parts. Errors: a number that is not finite, or beyond float16 where that is used."""
        if plan.name == "rope_inv_freq.weight":
            assert self.checkpoint.config.rope is not None
            yield self.checkpoint.config.rope.inv_freq.astype(np.float32)
        elif not plan.name.startswith("blk."):
            yield from self._rows(plan)
        else:
            _, layer, part = plan.name.split(".", 2)
            yield from self._layer_blocks(int(layer), part, plan)

    def _layer_blocks(self, i: int, part: str, plan: TensorPlan) -> Iterator[Array]:
        config, order = self.checkpoint.config, self.activations.order(i)
        if part == "ffn_neurons.weight":
            yield self._bundles(i, bundle_rows(config, self.plans[i].mode), plan)
        elif part == "ffn_select.weight":
            yield self._bundles(i, (deciding_row(config),), plan)
        elif part in ("ffn_gate.bias", "ffn_up.bias"):
            yield quantise(plan, self._read(plan, plan.name)[order])
        elif part == "ffn_order.weight":
            yield order.astype(np.int32)
        elif part == "ffn_expert.weight":
            assert config.experts is not None
            yield (order // (config.n_ff // config.experts.n)).astype(np.int32)
        elif part == "ffn_frequency.weight":
            yield self.activations.frequency(i)[order].astype(np.float32)
        elif part.startswith("predictor_"):
            yield from self._predictor(i, part, plan)
        else:
            yield from self._rows(plan)

    def _read(self, plan: TensorPlan, name: str, rows: slice | None = None) -> FloatArray:
        """Rows of the checkpoint's tensor `name`, or all of it, checked to fit into plan.type."""
        numbers = self.checkpoint.read(name, rows)
        check_range(plan, name, numbers, rows.start if rows is not None else 0)
        return numbers

    def _rows(self, plan: TensorPlan) -> Iterator[Array]:
        """A tensor as the checkpoint has it."""
        if len(plan.shape) == 1:
            yield quantise(plan, self._read(plan, plan.name))
            return
        for rows in row_slices(plan.shape[1], plan.shape[0]):
            yield self._bytes(plan, plan.name, rows)

    def _bytes(self, plan: TensorPlan, name: str, rows: slice) -> Array:
        """Rows of the checkpoint's matrix as plan.type's bytes: those that it has, where it has that type."""
        stored = self.checkpoint.stored(name, plan.type, rows)
        if stored is not None and is_finite(plan.type, stored):
            return stored
        return quantise(plan, self._read(plan, name, rows))

    def _bundles(self, i: int, parts: tuple[str, ...], plan: TensorPlan) -> Array:
        """The rows of all neurons in stored order: uint8 [n_ff, len(parts), bytes of a row].

        Quantised before they are sorted: the float32 form of only one matrix is held at a time.
        """
        order = self.activations.order(i)
        stored_at = np.empty_like(order)
        stored_at[order] = np.arange(len(order))
        elements, size = BLOCK[plan.type]
        bundles = np.empty((len(order), len(parts), plan.shape[0] // elements * size), np.uint8)
        for r, part in enumerate(parts):
            for neurons, rows in self._neuron_rows(plan, f"blk.{i}.{part}.weight"):
                bundles[stored_at[neurons], r] = rows
        return bundles

    def _neuron_rows(self, plan: TensorPlan, name: str) -> Iterator[tuple[slice, Array]]:
        """Bytes of a row a neuron, in the checkpoint's order: rows of gate and up, columns of down."""
        config = self.checkpoint.config
        columns = None
        for neurons in row_slices(config.n_ff, config.n_embd):
            if not name.endswith("ffn_down.weight"):
                yield neurons, self._bytes(plan, name, neurons)
                continue
            stored = self.checkpoint.stored(name.replace("ffn_down", "ffn_down_t"), plan.type, neurons)
            if stored is not None and is_finite(plan.type, stored):
                yield neurons, stored
                continue
            columns = self._read(plan, name) if columns is None else columns
            yield neurons, quantise(plan, np.ascontiguousarray(columns[:, neurons].T))

    def _predictor(self, i: int, part: str, plan: TensorPlan) -> Iterator[Array]:
        assert self.predictors is not None
        w_in, w_out, bias = self.predictors.weights(i)
        asked = self.activations.order(i)[self.plans[i].always :]
        parts = {"predictor_in.weight": w_in, "predictor_out.weight": w_out, "predictor_out.bias": bias}
        numbers = parts[part] if part == "predictor_in.weight" else parts[part][asked]
        check_range(plan, plan.name, numbers)
        yield quantise(plan, numbers)


def deciding_row(config: Config) -> str:
    """The matrix whose row says whether a neuron fires."""
    return "ffn_gate" if config.gated else "ffn_up"


def bundle_rows(config: Config, mode: int) -> tuple[str, ...]:
    """The matrices that make a bundle, in order; in mode gate the deciding row lies apart."""
    rows = ("ffn_gate", "ffn_up", "ffn_down") if config.gated else ("ffn_up", "ffn_down")
    return rows[1:] if mode == MODE_GATE else rows


def row_slices(n_rows: int, row: int) -> Iterator[slice]:
    """Slices of rows of `row` elements, BLOCK_ELEMENTS at a time."""
    step = max(1, BLOCK_ELEMENTS // row)
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))


def quantise(plan: TensorPlan, rows: FloatArray) -> Array:
    """Rows of float32 as plan.type's bytes, uint8 [..., bytes of a row], bit for bit as the gguf package does it."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    rows = np.ascontiguousarray(rows, np.float32)
    return quantize(rows, GGMLQuantizationType(TYPE_ID[plan.type])).view(np.uint8)


def is_finite(type: str, rows: Array) -> bool:
    """Whether bytes of `type` stand for finite numbers: of quantised blocks, the scales that they begin with."""
    size = BLOCK[type][1]
    kind = np.float32 if type == "f32" else np.float16
    return bool(np.isfinite(rows.reshape(len(rows), -1, size)[..., : np.dtype(kind).itemsize].copy().view(kind)).all())


def check_range(plan: TensorPlan, name: str, numbers: FloatArray, first_row: int = 0) -> None:
    """Refuses what plan.type cannot hold, naming the first such number's place in the checkpoint's tensor."""
    limit = np.finfo(np.float32).max if plan.type == "f32" else _MAX_FLOAT16
    if numbers.min() >= -limit and numbers.max() <= limit:  # both are NaN where any number is
        return
    index = [int(k) for k in np.argwhere(~(np.abs(numbers) <= limit))[0]]
    found = numbers[tuple(index)]
    index[0] += first_row
    expected = f"a number within ±{limit:g} for {plan.type}" if np.isfinite(found) else "a finite number"
    raise PowerinferError(f"{name} {index}: expected {expected}, found {found:g}", "malformed")
