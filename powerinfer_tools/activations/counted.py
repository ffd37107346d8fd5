"""Firing counts that were made for the first PowerInfer: a folder of activation_N.pt, n_ff numbers each."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from powerinfer_tools.activations.file import KIND, Activations, read_activations
from powerinfer_tools.checkpoint.source import Checkpoint
from powerinfer_tools.checkpoint.torch_file import array_of, read_torch
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.files import Array, sha256_bytes, sha256_file, write_table

NUMBER_BYTES = 8  # of the widest type that counts are saved in
MOST = 10**6  # what the largest share becomes, where counts were divided by something

Counts = npt.NDArray[np.int64]


def take_counts(checkpoint: Checkpoint, folder: Path, output: Path, force: bool = False) -> Activations:
    """Writes activations that hold nothing but the counts of `folder`: no samples to train predictors with.

    The files do not say of how many tokens: the most frequent neuron of all is taken to fire for each of them.
    Errors: a layer's file is missing, or there is one more; not n_ff numbers, not negative; nothing fires.
    """
    config = checkpoint.config
    counts = _read_layers(folder, config.n_layer, config.n_ff)
    header = {
        "inputs": {"checkpoint": checkpoint.digest(), "counts": counts_digest(folder, config.n_layer)},
        "corpus": [],
        "model": config.name,
        "activation": config.activation,
        "n_layer": config.n_layer,
        "n_embd": config.n_embd,
        "n_ff": config.n_ff,
        "n_tokens": int(max(layer.max() for layer in counts)),
        "n_samples": 0,
        "window": 0,
        "thresholds": list(config.thresholds),
    }
    arrays: dict[str, Array] = {"positions": np.empty(0, np.int64), "held_out": np.empty((0, 1), np.int32)}
    for i, layer in enumerate(counts):
        arrays[f"counts.{i}"] = layer
        arrays[f"inputs.{i}"] = np.empty((0, config.n_embd), np.float16)
        arrays[f"active.{i}"] = np.empty((0, -(-config.n_ff // 8)), np.uint8)
    write_table(output, KIND, header, arrays, force)
    return read_activations(output)


def counts_digest(folder: Path, n_layer: int) -> str:
    """Of the files of all layers. Errors: one is missing."""
    return sha256_bytes("".join(sha256_file(_layer_file(folder, i)) for i in range(n_layer)).encode())


def _read_layers(folder: Path, n_layer: int, n_ff: int) -> list[Counts]:
    layers = [_read_layer(_layer_file(folder, i), n_ff) for i in range(n_layer)]
    if (beyond := folder / f"activation_{n_layer}.pt").exists():
        raise PowerinferError(f"{beyond}: expected counts of {n_layer} layers, found those of more", "mismatch")
    most = max(layer.max() for layer in layers)
    if most <= 0:
        raise PowerinferError(f"{folder}: expected counts of neurons that fire, found none above 0", "malformed")
    whole = all((layer == np.rint(layer)).all() for layer in layers) and most < 2**53
    return [np.rint(layer if whole else layer * (MOST / most)).astype(np.int64) for layer in layers]


def _layer_file(folder: Path, i: int) -> Path:
    """Layer i's file. The number in its name counts, not its place among sorted names."""
    path = folder / f"activation_{i}.pt"
    if not path.is_file():
        raise PowerinferError(f"{path}: expected the counts of layer {i}, found no such file", "mismatch")
    return path


def _read_layer(path: Path, n_ff: int) -> npt.NDArray[np.float64]:
    counts = array_of(path, "counts", read_torch(path, n_ff * NUMBER_BYTES), (n_ff,))
    if counts.min() < 0:
        raise PowerinferError(f"{path}: expected counts of at least 0, found {counts.min():g}", "malformed")
    return counts
