"""Artifacts of well-known shapes with planted sparsity, for timing: weights are random, only speed means anything.

    python benchmarks/shapes.py llama-2-7b q4_0 0.1 OUTPUT.gguf
    python benchmarks/shapes.py llama-2-7b q4_0 plain OUTPUT.gguf     # dense, for llama.cpp

Which neurons a token computes is decided by a random linear predictor of rank RANK, whose biases make neuron i pass
for a share f_i of inputs; f_i falls by a power law, and its mean is the share that was asked for. What passes fires (a
large bias on the gate), so the active set changes with every token and the bytes read are those of a predictor
without error. Mode `dense` of the same file reads every neuron.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import NormalDist
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).parents[1]))

from powerinfer_tools.artifact.gguf_writer import write_gguf
from powerinfer_tools.artifact.layout import MODE_PREDICTOR, LayerPlan, TensorPlan, tensor_table
from powerinfer_tools.artifact.metadata import artifact_metadata, general_keys, model_keys
from powerinfer_tools.checkpoint import Checkpoint, Config, Rope
from powerinfer_tools.files import atomic_write
from tests.tiny import make_tokenizer

SHAPES = {  # n_layer, n_embd, n_ff, n_head, n_head_kv
    "llama-2-7b": (32, 4096, 11008, 32, 32),
    "mistral-7b": (32, 4096, 14336, 32, 8),
    "tinyllama-1.1b": (22, 2048, 5632, 32, 4),
}
N_VOCAB, RANK, GATE_BIAS = 32000, 256, 50.0
SPREAD = 4.32  # standard deviation of whole numbers from -7 to 7
BLOCK_BYTES = 16 << 20  # random bytes that are drawn once and used again


class Planted(Checkpoint):
    """What artifact_metadata asks of a checkpoint; it has no weights of its own."""

    def __init__(self, shape: str) -> None:
        n_layer, n_embd, n_ff, n_head, n_head_kv = SHAPES[shape]
        head_dim = n_embd // n_head
        inv_freq = 1e4 ** (-np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
        self.path = Path(shape)
        self.config = Config(
            arch="llama",
            name=f"{shape}, random weights",
            n_layer=n_layer,
            n_embd=n_embd,
            n_ff=n_ff,
            n_head=n_head,
            n_head_kv=n_head_kv,
            head_dim=head_dim,
            n_vocab=N_VOCAB,
            n_ctx=4096,
            norm_eps=1e-5,
            activation="relu",
            gated=True,
            tied=False,
            rope=Rope(inv_freq.astype(np.float32)),
            thresholds=(0.0,) * n_layer,
        )
        self.tokenizer_json = make_tokenizer(N_VOCAB)
        self.chat_template, self.metadata, self.notes = None, {"name": self.config.name}, []
        self.special: dict[str, Any] = {"bos": 0, "eos": [1], "add_bos": False}

    def names(self) -> frozenset[str]:
        return frozenset(f"blk.{i}.ffn_gate.bias" for i in range(self.config.n_layer))

    def read(self, name: str, rows: slice | None = None) -> npt.NDArray[np.float32]:
        raise AssertionError("planted weights are drawn as they are written")

    def digest(self) -> str:
        return "0" * 64


def frequencies(n_ff: int, active: float) -> npt.NDArray[np.float64]:
    """Falling by a power law, at most 1, with mean `active`: bisection over its exponent."""
    low, high = 0.0, 8.0
    for _ in range(60):
        middle = (low + high) / 2
        f = (1 + np.arange(n_ff) * 20 / n_ff) ** -middle
        low, high = (middle, high) if f.mean() > active else (low, middle)
    return f


class Drawn:
    """Blocks of random weights, zero mean, of the size that keeps activations near 1."""

    def __init__(self, config: Config, active: float) -> None:
        self.config, self.frequency = config, frequencies(config.n_ff, active)
        self.n_active = active * config.n_ff
        rng = np.random.default_rng(0)
        self.numbers = rng.integers(-7, 8, BLOCK_BYTES).astype(np.int8)

    def tensor(self, plan: TensorPlan) -> Iterator[npt.NDArray[Any]]:
        """The tensor's bytes, in pieces."""
        name = plan.name
        if name.endswith("norm.weight"):
            yield np.ones(plan.shape[0], np.float32)
        elif name.endswith("rope_inv_freq.weight"):
            assert self.config.rope is not None
            yield self.config.rope.inv_freq
        elif name.endswith("ffn_gate.bias"):
            yield np.full(plan.shape[0], GATE_BIAS, np.float32)
        elif name.endswith("ffn_order.weight"):
            yield np.arange(plan.shape[0], dtype=np.int32)
        elif name.endswith("ffn_frequency.weight"):
            yield self.frequency.astype(np.float32)
        elif name.endswith("predictor_out.bias"):
            normal = NormalDist()
            yield np.array([normal.inv_cdf(min(f, 0.999)) for f in self.frequency], np.float32)
        else:
            yield from self.matrix(plan)

    def matrix(self, plan: TensorPlan) -> Iterator[npt.NDArray[Any]]:
        n_rows = int(np.prod(plan.shape[1:]))
        size = np.full(n_rows, 1 / (SPREAD * plan.shape[0] ** 0.5), np.float32)
        if plan.name.endswith("ffn_neurons.weight"):
            size.reshape(-1, plan.shape[1])[:, -1] = 1 / (SPREAD * GATE_BIAS * self.n_active**0.5)
        step = max(1, BLOCK_BYTES // 2 // plan.shape[0])
        for begin in range(0, n_rows, step):
            first = crc32(f"{plan.name} {begin}".encode()) % (BLOCK_BYTES // 2)  # no two matrices alike
            numbers = self.numbers[first : first + len(size[begin : begin + step]) * plan.shape[0]]
            yield self.rows(plan.type, numbers.reshape(-1, plan.shape[0]), size[begin : begin + step])

    def rows(self, kind: str, numbers: npt.NDArray[np.int8], size: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        """Rows of whole numbers times each row's size, as ggml stores them."""
        n = numbers.shape[1]
        if kind in ("f32", "f16"):
            return (numbers * size[:, None]).astype(np.float32 if kind == "f32" else np.float16)
        blocks = numbers.reshape(len(size), n // 32, 32)
        scale = np.broadcast_to(size.astype(np.float16)[:, None, None], (*blocks.shape[:2], 1)).copy().view(np.uint8)
        if kind == "q8_0":
            return np.concatenate([scale, blocks.view(np.uint8)], axis=2)
        nibbles = (blocks + 8).astype(np.uint8)
        return np.concatenate([scale, nibbles[..., :16] | nibbles[..., 16:] << 4], axis=2)


def write_shape(shape: str, quant: str, active: float, output: Path) -> None:
    """Writes the artifact, in about a second a gigabyte."""
    checkpoint = Planted(shape)
    config = checkpoint.config
    plans = [LayerPlan(MODE_PREDICTOR, RANK, 0)] * config.n_layer
    table = tensor_table(config, plans, quant, checkpoint.biases)
    metadata = artifact_metadata(checkpoint, plans, quant, False, None, {"planted": active})
    drawn = Drawn(config, active)
    with atomic_write(output, force=True) as file:
        write_gguf(file, metadata, table, (drawn.tensor(plan) for plan in table))


def plain_table(config: Config, quant: str) -> list[TensorPlan]:
    """The tensors that llama.cpp expects of a llama."""
    d, kv = config.n_embd, config.n_head_kv * config.head_dim
    table = [TensorPlan("token_embd.weight", quant, (d, N_VOCAB))]
    for i in range(config.n_layer):
        table.append(TensorPlan(f"blk.{i}.attn_norm.weight", "f32", (d,)))
        for name, row, n in (("attn_q", d, d), ("attn_k", d, kv), ("attn_v", d, kv), ("attn_output", d, d)):
            table.append(TensorPlan(f"blk.{i}.{name}.weight", quant, (row, n)))
        table.append(TensorPlan(f"blk.{i}.ffn_norm.weight", "f32", (d,)))
        for name, row, n in (("ffn_gate", d, config.n_ff), ("ffn_up", d, config.n_ff), ("ffn_down", config.n_ff, d)):
            table.append(TensorPlan(f"blk.{i}.{name}.weight", quant, (row, n)))
    return [*table, TensorPlan("output_norm.weight", "f32", (d,)), TensorPlan("output.weight", quant, (d, N_VOCAB))]


def write_plain(shape: str, quant: str, output: Path) -> None:
    """Writes a GGUF file that llama.cpp loads, with every matrix in `quant`."""
    checkpoint = Planted(shape)
    metadata = {
        **general_keys(checkpoint, quant),
        **model_keys(checkpoint.config),
        "tokenizer.ggml.model": "no_vocab",
    }
    table, drawn = plain_table(checkpoint.config, quant), Drawn(checkpoint.config, 1.0)
    with atomic_write(output, force=True) as file:
        write_gguf(file, metadata, table, (drawn.tensor(plan) for plan in table))


if __name__ == "__main__":
    shape, quant, active, output = sys.argv[1:]
    if active == "plain":
        write_plain(shape, quant, Path(output))
    else:
        write_shape(shape, quant, float(active), Path(output))
