"""One layer of a profile: hidden states in, hidden states, counts and samples out."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from powerinfer_tools import reference
from powerinfer_tools.checkpoint.source import Checkpoint
from powerinfer_tools.files import Array, atomic_write
from powerinfer_tools.reference.ffn import activate

EMBEDDED_VALUES = 1 << 25  # of a batch of embeddings: few batches, as each one reads the whole table
BATCH_VALUES = 1 << 23  # neuron values of a batch of windows: 32 MiB in float32
CALIBRATION_VALUES = 1 << 23  # |act(gate)| values that a threshold is chosen from
F16_MAX = 65504.0

Shape = tuple[int, ...]


def embed_tokens(checkpoint: Checkpoint, tokens: Array, path: Path) -> None:
    """Writes the embeddings of tokens [n_windows, window] as float32 [n_windows, window, n_embd]."""
    with atomic_write(path, force=True) as file:
        for part in _batches(tokens.shape, checkpoint.config.n_embd, EMBEDDED_VALUES):
            hidden = reference.embed(checkpoint, torch.from_numpy(tokens[part]))
            file.write(hidden.contiguous().numpy().data)


def profile_layer(
    checkpoint: Checkpoint,
    i: int,
    shape: Shape,
    states: tuple[Path, Path],
    positions: Array,
    sparsity: float | None,
    device: str,
) -> tuple[float, dict[str, Array]]:
    """Sends all hidden states of `states[0]` through layer i into `states[1]`; returns its threshold and record.

    The record: counts int64 [n_ff], inputs float16 [n_samples, n_embd], active uint8 [n_samples, n_ff / 8] packed,
    of models of experts routes float32 [n_samples, n_experts].
    """
    config = checkpoint.config
    layer = reference.load_layer(checkpoint, i, device)
    hidden = _Hidden(states[0], (*shape, config.n_embd), device)
    with torch.inference_mode():
        if sparsity is not None:
            layer.ffn.threshold = _threshold(layer, hidden, shape, config.n_ff, sparsity)
        counts = torch.zeros(config.n_ff, dtype=torch.int64, device=device)
        inputs, active, routed = [], [], []
        with atomic_write(states[1], force=True) as file:
            for part in _batches(shape, config.n_ff, BATCH_VALUES):
                before = hidden[part]
                after_attention, x = layer.attention(before)
                routes = layer.routes(before, x)
                neurons = layer.ffn.neurons(x, routes)
                fired = (neurons != 0).flatten(0, 1)
                counts += fired.sum(0)
                inside = _inside(positions, part, shape[1])
                inputs.append(x.flatten(0, 1)[inside].clamp(-F16_MAX, F16_MAX).half().cpu().numpy())
                active.append(np.packbits(fired[inside].cpu().numpy(), axis=1))
                if routes is not None:
                    routed.append(routes.flatten(0, 1)[inside].cpu().numpy())
                after = after_attention + layer.ffn.output(neurons)
                file.write(after.cpu().contiguous().numpy().data)
    record = {"counts": counts.cpu().numpy(), "inputs": np.concatenate(inputs), "active": np.concatenate(active)}
    if routed:
        record["routes"] = np.concatenate(routed)
    return float(layer.ffn.threshold), record


def _threshold(layer: "reference.Layer", hidden: "_Hidden", shape: Shape, n_ff: int, sparsity: float) -> float:
    """The `sparsity` quantile of |act(gate)| over evenly spread windows (CATS, arXiv 2404.08763, section 3)."""
    wanted = max(1, CALIBRATION_VALUES // (shape[1] * n_ff))
    chosen = np.unique(np.arange(min(wanted, shape[0])) * shape[0] // min(wanted, shape[0]))
    values = []
    for w in chosen.tolist():
        before = hidden[slice(w, w + 1)]
        _, x = layer.attention(before)
        a = activate(layer.ffn.select(x), layer.ffn.activation).abs()
        routes = layer.routes(before, x)
        values.append(a.flatten() if routes is None else a[layer.ffn.each(routes) > 0])
    magnitudes = torch.cat(values)
    return float(magnitudes.kthvalue(max(1, round(sparsity * len(magnitudes)))).values)


def _batches(shape: Shape, values_per_token: int, bound: int) -> Iterator[slice]:
    """Windows in slices whose values fit the bound."""
    step = max(1, bound // (shape[1] * values_per_token))
    for begin in range(0, shape[0], step):
        yield slice(begin, min(begin + step, shape[0]))


def _inside(positions: Array, part: slice, window: int) -> torch.Tensor:
    """The sampled positions within the windows `part`, counted from its first token."""
    begin, end = np.searchsorted(positions, [part.start * window, part.stop * window])
    return torch.from_numpy(positions[begin:end] - part.start * window)


class _Hidden:
    """Hidden states in a file: float32 [n_windows, window, n_embd], read by slices of windows."""

    def __init__(self, path: Path, shape: Shape, device: str) -> None:
        self._path, self._shape, self._device = path, shape, device

    def __getitem__(self, part: slice) -> torch.Tensor:
        values = int(np.prod(self._shape[1:]))
        states = torch.empty(part.stop - part.start, *self._shape[1:])
        with self._path.open("rb") as file:
            file.seek(part.start * values * 4)
            file.readinto(states.numpy().data.cast("B"))
        return states.to(self._device)
