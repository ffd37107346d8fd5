"""profile(): calibration text through the model, one layer at a time, to an .activations file."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from powerinfer_tools.activations.corpus import calibration_windows
from powerinfer_tools.activations.file import HELD_OUT_EVERY, KIND, Activations, read_activations
from powerinfer_tools.checkpoint.source import Checkpoint
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.files import Array, Table, read_table, sha256_bytes, sha256_file, write_table
from powerinfer_tools.progress import Progress, default_progress
from powerinfer_tools.work import resumable

LAYER_KIND = "profiled layer"
HELD_OUT_TOKENS = 2048


def profile(
    checkpoint: Checkpoint,
    corpus: list[Path],
    output: Path,
    *,
    n_tokens: int = 32768,
    n_samples: int = 4096,
    sparsity: float | None = None,
    window: int = 512,
    seed: int = 0,
    force: bool = False,
    progress: Progress | None = None,
) -> Activations:
    """Counts which FFN neurons fire on a corpus and keeps a sample of FFN inputs, in `output`.

    All tokens pass layer 0, then layer 1, and so on: memory holds one layer and a batch of windows, a file beside the
    output the hidden states. A killed run goes on at its last layer and ends in the same bytes. sparsity: cuts silu at
    the threshold, one a layer, below which this share of |act(gate)| lies (CATS, arXiv 2404.08763).
    Errors: sparsity with an exactly sparse model; corpus too short; output exists without `force`.
    """
    if sparsity is not None:
        _check_sparsity(checkpoint, sparsity)
    window = min(window, checkpoint.config.n_ctx)
    tokens = calibration_windows(checkpoint, corpus, n_tokens, window)
    digest = checkpoint.digest()
    fingerprint = {
        "checkpoint": digest,
        "corpus": [sha256_file(path) for path in corpus],
        "tokens": [*tokens.shape, sha256_bytes(tokens.tobytes())],
        "samples": min(n_samples, tokens.size),
        "sparsity": sparsity,
        "seed": seed,
        "device": _device(),
    }
    positions = np.sort(np.random.default_rng(seed).permutation(tokens.size)[: fingerprint["samples"]])
    with resumable(output, fingerprint, force) as folder, default_progress(progress) as show:
        layers = _run_layers(checkpoint, tokens, positions, sparsity, folder, show)
        thresholds = [layer.header["threshold"] for layer in layers]
        header = _header(checkpoint, digest, corpus, tokens, positions, sparsity, seed, thresholds)
        write_table(output, KIND, header, _Arrays(layers, positions, _held_out(tokens)), force)
    return read_activations(output)


def _check_sparsity(checkpoint: Checkpoint, sparsity: float) -> None:
    if checkpoint.config.exactly_sparse:
        activation = checkpoint.config.activation
        raise PowerinferError(
            f"{checkpoint.path}: --sparsity cuts activations that are never zero; {activation} gives exact zeros "
            "already: leave --sparsity out",
            "usage",
        )
    if not 0 < sparsity < 1:
        raise PowerinferError(f"sparsity: expected a share between 0 and 1, found {sparsity}", "usage")


def _device() -> str:
    from torch import cuda

    return "cuda" if cuda.is_available() else "cpu"


def _run_layers(
    checkpoint: Checkpoint,
    tokens: Array,
    positions: Array,
    sparsity: float | None,
    folder: Path,
    show: Progress,
) -> list[Table]:
    """The records of all layers, those that `folder` lacks made now."""
    from powerinfer_tools.activations.firing import embed_tokens, profile_layer

    layers: list[Table] = []
    for i in range(checkpoint.config.n_layer):
        record, hidden, following = folder / f"layer.{i}", folder / f"hidden.{i}", folder / f"hidden.{i + 1}"
        if not record.exists():
            if i == 0:
                embed_tokens(checkpoint, tokens, hidden)
            threshold, arrays = profile_layer(
                checkpoint, i, tokens.shape, (hidden, following), positions, sparsity, _device()
            )
            write_table(record, LAYER_KIND, {"threshold": threshold}, arrays, force=True)
        hidden.unlink(missing_ok=True)
        layers.append(read_table(record, LAYER_KIND))
        show("profile, layers", i + 1, checkpoint.config.n_layer)
    return layers


def _held_out(tokens: Array) -> Array:
    """Evenly spread windows among those whose samples no predictor is fitted to, HELD_OUT_TOKENS of them at most."""
    windows = tokens[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY] if len(tokens) >= HELD_OUT_EVERY else tokens[-1:]
    n = min(len(windows), max(1, HELD_OUT_TOKENS // tokens.shape[1]))
    chosen: Array = windows[np.arange(n) * len(windows) // n].astype(np.int32)
    return chosen


class _Arrays(Mapping[str, Array]):
    """The arrays of all layers, read one at a time, the sampled positions, and the windows held out."""

    def __init__(self, layers: list[Table], positions: Array, held_out: Array) -> None:
        self._layers = layers
        self._whole = {"positions": positions, "held_out": held_out}

    def __getitem__(self, name: str) -> Array:
        if name in self._whole:
            return self._whole[name]
        what, layer = name.split(".")
        return self._layers[int(layer)].arrays[what]

    def __iter__(self) -> Iterator[str]:
        yield from self._whole
        for i in range(len(self._layers)):
            yield from (f"{what}.{i}" for what in self._layers[i].arrays)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _header(
    checkpoint: Checkpoint,
    digest: str,
    corpus: list[Path],
    tokens: Array,
    positions: Array,
    sparsity: float | None,
    seed: int,
    thresholds: list[float],
) -> dict[str, Any]:
    config = checkpoint.config
    return {
        "inputs": {"checkpoint": digest},
        "corpus": [{"name": path.name, "sha256": sha256_file(path)} for path in corpus],
        "model": config.name,
        "activation": config.activation,
        "n_layer": config.n_layer,
        "n_embd": config.n_embd,
        "n_ff": config.n_ff,
        "n_tokens": int(tokens.size),
        "n_samples": len(positions),
        "window": int(tokens.shape[1]),
        "sparsity": sparsity,
        "seed": seed,
        "thresholds": thresholds,
    }
