"""Small models whose firing is known beforehand, and text to profile them on."""

import json
from pathlib import Path

import numpy as np

from tests import tiny

N_EMBD, N_FF = 256, 512


def write_text(path: Path, seed: int = 0, n_words: int = 6000) -> Path:
    """A file of random words, no two seeds alike."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlucmfw"))
    words = ["".join(rng.choice(letters, rng.integers(2, 8))) for _ in range(400)]
    path.write_text(" ".join(rng.choice(words, n_words)))
    return path


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Name to array."""
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def make_patterned(folder: Path, n_layer: int = 12, n_ff: int = 96) -> tuple[Path, np.ndarray]:
    """A ReLU model whose layer i fires neurons pattern[i] for every token and no others: bool [n_layer, n_ff]."""
    tiny.make_llama(folder, n_layer=n_layer, n_ff=n_ff, bias=True)
    tensors = read_tensors(folder)
    pattern = np.random.default_rng(1).random((n_layer, n_ff)) < np.linspace(0.1, 0.9, n_layer)[:, None]
    for i in range(n_layer):
        tensors[f"model.layers.{i}.mlp.gate_proj.bias"] = np.where(pattern[i], 1e3, -1e3).astype(np.float32)
    tiny.write_safetensors(folder, tensors)
    return folder, pattern


def make_low_rank(folder: Path, n_layer: int = 2, rank: int = 12, noise: float = 0.1) -> Path:
    """A ReLU model whose gates have low rank plus noise; how often neuron j fires falls as a power of j."""
    tiny.make_llama(folder, n_layer=n_layer, n_embd=N_EMBD, n_ff=N_FF, n_head=4, n_head_kv=2, bias=True)
    tensors = read_tensors(folder)
    rng = np.random.default_rng(2)
    for i in range(n_layer):
        gate = rng.standard_normal((N_FF, rank)) @ rng.standard_normal((rank, N_EMBD))
        gate /= np.linalg.norm(gate, axis=1, keepdims=True)
        gate += noise * rng.standard_normal(gate.shape) / np.sqrt(N_EMBD)
        bias = -(np.linspace(0.0, 2.5, N_FF) ** 0.7)
        mlp = f"model.layers.{i}.mlp"
        tensors[f"{mlp}.gate_proj.weight"] = gate.astype(np.float32)
        tensors[f"{mlp}.gate_proj.bias"] = rng.permutation(bias).astype(np.float32)
    tiny.write_safetensors(folder, tensors)
    return folder


def set_activation(folder: Path, activation: str) -> Path:
    """The same weights with another activation."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": activation}))
    return folder
