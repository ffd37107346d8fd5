"""Small inputs of split: checkpoints with random activations and predictors, made without running a model."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from powerinfer_tools.activations import Activations, read_activations
from powerinfer_tools.artifact.layout import MODE_GATE, MODE_PREDICTOR, LayerPlan
from powerinfer_tools.checkpoint import Checkpoint, open_checkpoint
from powerinfer_tools.files import write_table
from powerinfer_tools.predictors import Predictors, read_predictors
from tests.tiny import make_llama, make_opt

N_TOKENS = 1000


def make_checkpoint(folder: Path, family: str = "llama", **sizes: Any) -> Checkpoint:
    """A tiny checkpoint; llama with biases, so that every kind of tensor is there."""
    if family == "opt":
        return open_checkpoint(make_opt(folder, **sizes))
    return open_checkpoint(make_llama(folder, **({"bias": True} | sizes)))


def make_activations(checkpoint: Checkpoint, path: Path, seed: int = 0) -> Activations:
    """A random firing pattern, another in each layer, with ties."""
    config, rng = checkpoint.config, np.random.default_rng(seed)
    header = {
        "inputs": {"checkpoint": checkpoint.digest()},
        "n_layer": config.n_layer,
        "n_embd": config.n_embd,
        "n_ff": config.n_ff,
        "n_tokens": N_TOKENS,
        "n_samples": 0,
        "window": 64,
        "thresholds": list(config.thresholds),
    }
    counts = {f"counts.{i}": rng.integers(0, N_TOKENS // 4, config.n_ff) for i in range(config.n_layer)}
    write_table(path, "activations", header, counts, force=True)
    return read_activations(path)


def make_predictors(
    checkpoint: Checkpoint, activations: Activations, path: Path, rank: int = 32, seed: int = 0
) -> Predictors:
    """Random predictors in the layers with an even number, mode gate in the others."""
    config, rng = checkpoint.config, np.random.default_rng(seed)
    plans, arrays = [], {}
    for i in range(config.n_layer):
        if i % 2:
            plans.append(LayerPlan(MODE_GATE))
            continue
        plans.append(LayerPlan(MODE_PREDICTOR, rank, always=8 + i))
        arrays[f"in.{i}"] = rng.standard_normal((rank, config.n_embd)).astype(np.float32)
        arrays[f"out.{i}"] = rng.standard_normal((config.n_ff, rank)).astype(np.float32)
        arrays[f"bias.{i}"] = rng.standard_normal(config.n_ff).astype(np.float32)
    header = {
        "inputs": {"checkpoint": checkpoint.digest(), "activations": activations.digest},
        "relu": True,
        "quant": "q4_0",
        "plans": [asdict(plan) for plan in plans],
        "figures": [{"layer": i, "recall": 1.0} for i in range(config.n_layer)],
    }
    write_table(path, "predictors", header, arrays, force=True)
    return read_predictors(path)
