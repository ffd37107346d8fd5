"""The tensors of a model file of the first PowerInfer, made of a checkpoint's, under its names and in its layouts."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np

from powerinfer_tools.artifact.weights import FloatArray, row_slices
from powerinfer_tools.checkpoint.config import Config
from powerinfer_tools.checkpoint.source import Checkpoint
from powerinfer_tools.checkpoint.tensors import bias_shapes, required_shapes
from powerinfer_tools.families.opt import OFFSET
from powerinfer_tools.predictors.file import Predictors


@dataclass(frozen=True)
class Tensor:
    """shape: [n] or [out, in]; parts: its rows, some at a time."""

    shape: tuple[int, ...]
    parts: Callable[[], Iterator[FloatArray]]


Tensors = dict[str, Tensor]


def pwri_tensors(checkpoint: Checkpoint, predictors: Predictors) -> Tensors:
    """All of them, in the checkpoint's order of neurons."""
    config = checkpoint.config
    shapes = required_shapes(config) | bias_shapes(config)
    tensors = {name: _stored(checkpoint, name, shapes[name]) for name in shapes if name in checkpoint.names()}
    if config.learned_positions:
        tensors["position_embd.weight"] = _with_offset(tensors["position_embd.weight"])
    elif config.tied:  # of its architectures, opt alone does without
        tensors["output.weight"] = tensors["token_embd.weight"]
    for i in range(config.n_layer):
        tensors |= _predictor(predictors, i, config)
        _transpose_down(tensors, f"blk.{i}")
        if config.parallel:
            _arrange_falcon(tensors, f"blk.{i}")
        elif config.rope is not None:
            _interleave(tensors, f"blk.{i}", config.head_dim)
    return tensors


def _stored(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> Tensor:
    n_rows, row = (*shape, 1)[:2]
    return Tensor(shape, lambda: (checkpoint.read(name, rows) for rows in row_slices(n_rows, row)))


def _predictor(predictors: Predictors, i: int, config: Config) -> Tensors:
    rank = predictors.plans[i].rank
    return {
        f"blk.{i}.fc1.weight": Tensor((rank, config.n_embd), lambda: iter([predictors.weights(i)[0]])),
        f"blk.{i}.fc2.weight": Tensor((config.n_ff, rank), lambda: iter([predictors.weights(i)[1]])),
    }


def _changed(tensor: Tensor, shape: tuple[int, ...], change: Callable[[FloatArray], FloatArray]) -> Tensor:
    """What `change` makes of the whole tensor."""
    return Tensor(shape, lambda: iter([np.ascontiguousarray(change(np.concatenate(list(tensor.parts()))))]))


def _with_offset(positions: Tensor) -> Tensor:
    """OPT's rows before position 0, which nothing reads, are part of its table."""
    n, n_embd = positions.shape
    before = np.zeros((OFFSET, n_embd), np.float32)
    return Tensor((n + OFFSET, n_embd), lambda: chain([before], positions.parts()))


def _transpose_down(tensors: Tensors, b: str) -> None:
    down = tensors.pop(f"{b}.ffn_down.weight")
    tensors[f"{b}.ffn_down_t.weight"] = _changed(down, down.shape[::-1], np.transpose)
    if f"{b}.ffn_down.bias" in tensors:
        tensors[f"{b}.ffn_down_t.bias"] = tensors.pop(f"{b}.ffn_down.bias")


def _interleave(tensors: Tensors, b: str, head_dim: int) -> None:
    """Rows j and j + half of a head, which rotate together, come to places 2j and 2j + 1."""

    def pairs(rows: FloatArray) -> FloatArray:
        halves = rows.reshape(-1, 2, head_dim // 2, rows.shape[1])
        paired: FloatArray = halves.swapaxes(1, 2).reshape(rows.shape)
        return paired

    for name in (f"{b}.attn_q.weight", f"{b}.attn_k.weight"):
        tensors[name] = _changed(tensors[name], tensors[name].shape, pairs)


def _arrange_falcon(tensors: Tensors, b: str) -> None:
    """q, k and v are one matrix; attn_norm is the FFN's norm, attn_norm_2 attention's."""
    q, k, v = (tensors.pop(f"{b}.attn_{part}.weight") for part in "qkv")
    shape = (q.shape[0] + k.shape[0] + v.shape[0], q.shape[1])
    tensors[f"{b}.attn_qkv.weight"] = Tensor(shape, lambda: chain(q.parts(), k.parts(), v.parts()))
    for end in ("weight", "bias"):
        tensors[f"{b}.attn_norm_2.{end}"] = tensors[f"{b}.attn_norm.{end}"]
        tensors[f"{b}.attn_norm.{end}"] = tensors.pop(f"{b}.ffn_norm.{end}")
