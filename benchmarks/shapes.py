"""Artifacts of well-known shapes with planted sparsity, for timing: weights are random, only speed means anything.

    python benchmarks/shapes.py llama-2-7b q4_0 0.1 OUTPUT.gguf                 # ours, 10 % active
    python benchmarks/shapes.py llama-2-7b q4_0 plain OUTPUT.gguf               # dense, for llama.cpp
    python benchmarks/shapes.py llama-2-7b f16 0.1 OUTPUT.gguf --layers 12      # the same, of fewer layers

What is planted, and what it is not: which neurons a token computes is decided by a random linear predictor of rank
RANK on the layer's own input, whose biases make neuron i pass for a share f_i of inputs; f_i falls by a power law, and
its mean is the share that was asked for. What passes fires (a large bias on the deciding row). So the active set
changes with every token, is foreseen by a low-rank predictor without error, and costs the bytes of one; nothing is
learned, and the neurons of a set have nothing in common but the predictor. Of a token's set about a third fired for the
token before, too (10 % of a llama; 3 % of an opt: 39 %, in its last layers 57 %). Mode `dense` of the same file reads
every neuron. What fires and what is read are measured by `bench`, not taken from here.

llama.cpp gets the same shape as a plain llama. For opt, which it does not know, and falcon it gets the llama that reads
as many bytes a token: three FFN matrices as large together as their two (0.1 % smaller: rows are whole blocks of 32).
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).parents[1]))

from powerinfer_tools.artifact.gguf_writer import write_gguf
from powerinfer_tools.artifact.layout import MODE_PREDICTOR, QUANTS, LayerPlan, TensorPlan, tensor_table
from powerinfer_tools.artifact.metadata import artifact_metadata, general_keys, model_keys
from powerinfer_tools.checkpoint import Checkpoint, Config, Rope
from powerinfer_tools.files import atomic_write
from tests.tiny import make_tokenizer


@dataclass(frozen=True)
class Shape:
    """What a model's speed depends on."""

    name: str
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    arch: str = "llama"
    n_vocab: int = 32000
    n_ctx: int = 4096
    tied: bool = False


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-2-7b", 32, 4096, 11008, 32, 32),
        Shape("mistral-7b", 32, 4096, 14336, 32, 8),
        Shape("tinyllama-1.1b", 22, 2048, 5632, 32, 4),
        Shape("opt-6.7b", 32, 4096, 16384, 32, 32, arch="opt", n_vocab=50272, n_ctx=2048, tied=True),
        Shape("falcon-40b", 60, 8192, 32768, 128, 8, arch="falcon", n_vocab=65024, n_ctx=2048),
    )
}
RANK, FIRING_BIAS = 256, 50.0
SPREAD = 4.32  # standard deviation of whole numbers from -7 to 7
BLOCK_BYTES = 16 << 20  # random bytes that are drawn once and used again
BIASES = {
    "llama": "ffn_gate",
    "opt": "attn_norm attn_q attn_k attn_v attn_output ffn_norm ffn_up ffn_down",
    "falcon": "attn_norm ffn_norm ffn_up",
}
"""Of a layer: those of the model, and that of the deciding row, which is planted."""


def shape_config(shape: Shape) -> Config:
    """The shape with a ReLU FFN: gated in a llama, plain in an opt and, beside attention, in a falcon."""
    llama, opt = shape.arch == "llama", shape.arch == "opt"
    head_dim = shape.n_embd // shape.n_head
    inv_freq = 1e4 ** (-np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    return Config(
        arch=shape.arch,
        name=f"{shape.name}, random weights",
        n_layer=shape.n_layer,
        n_embd=shape.n_embd,
        n_ff=shape.n_ff,
        n_head=shape.n_head,
        n_head_kv=shape.n_head_kv,
        head_dim=head_dim,
        n_vocab=shape.n_vocab,
        n_ctx=shape.n_ctx,
        norm_eps=1e-5,
        activation="relu",
        gated=llama,
        tied=shape.tied,
        rope=None if opt else Rope(inv_freq.astype(np.float32)),
        thresholds=(0.0,) * shape.n_layer,
        norm="rms" if llama else "layer",
        learned_positions=opt,
        parallel=shape.arch == "falcon",
    )


class Planted(Checkpoint):
    """What artifact_metadata asks of a checkpoint; it has no weights of its own."""

    def __init__(self, config: Config) -> None:
        self.path, self.config = Path(config.name), config
        self.tokenizer_json = make_tokenizer(config.n_vocab)
        self.chat_template, self.metadata, self.notes = None, {"name": config.name}, []
        self.special: dict[str, Any] = {"bos": 0, "eos": [1], "add_bos": False}

    def names(self) -> frozenset[str]:
        """The biases alone."""
        names = {
            f"blk.{i}.{part}.bias" for i in range(self.config.n_layer) for part in BIASES[self.config.arch].split()
        }
        return frozenset(names | ({"output_norm.bias"} if self.config.norm == "layer" else set()))

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
        elif name.endswith("ffn_gate.bias" if self.config.gated else "ffn_up.bias"):
            yield np.full(plan.shape[0], FIRING_BIAS, np.float32)
        elif name.endswith("ffn_order.weight"):
            yield np.arange(plan.shape[0], dtype=np.int32)
        elif name.endswith("ffn_frequency.weight"):
            yield self.frequency.astype(np.float32)
        elif name.endswith("predictor_out.bias"):
            normal = NormalDist()
            yield np.array([normal.inv_cdf(min(f, 0.999)) for f in self.frequency], np.float32)
        elif name.endswith(".bias"):
            yield np.zeros(plan.shape[0], np.float32)
        else:
            yield from self.matrix(plan)

    def matrix(self, plan: TensorPlan) -> Iterator[npt.NDArray[Any]]:
        n_rows = int(np.prod(plan.shape[1:]))
        size = np.full(n_rows, 1 / (SPREAD * plan.shape[0] ** 0.5), np.float32)
        if plan.name.endswith("ffn_neurons.weight"):
            size.reshape(-1, plan.shape[1])[:, -1] = 1 / (SPREAD * FIRING_BIAS * self.n_active**0.5)
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


def write_shape(shape: Shape, quant: str, active: float, output: Path) -> None:
    """Writes our artifact, in about a second a gigabyte."""
    checkpoint = Planted(shape_config(shape))
    config = checkpoint.config
    plans = [LayerPlan(MODE_PREDICTOR, RANK, 0)] * config.n_layer
    table = tensor_table(config, plans, quant, checkpoint.biases)
    metadata = artifact_metadata(checkpoint, plans, quant, None, None, {"planted": active})
    _write(output, metadata, table, Drawn(config, active))


def write_plain(shape: Shape, quant: str, output: Path) -> None:
    """Writes a GGUF file that llama.cpp loads, with every matrix in `quant`."""
    config = plain_config(shape)
    table = plain_table(config, quant)
    _write(output, plain_keys(Planted(config), quant), table, Drawn(config, 1.0))


def plain_config(shape: Shape) -> Config:
    """The llama that llama.cpp runs in the shape's place: the same, or of equal bytes."""
    if shape.arch == "llama":
        return shape_config(shape)
    n_ff = shape.n_ff * 2 // 3 // 32 * 32
    return shape_config(replace(shape, arch="llama", n_ff=n_ff))


def plain_keys(checkpoint: Checkpoint, quant: str) -> dict[str, Any]:
    """Sizes, and no vocabulary."""
    return general_keys(checkpoint, quant) | model_keys(checkpoint.config) | {"tokenizer.ggml.model": "no_vocab"}


def plain_table(config: Config, quant: str) -> list[TensorPlan]:
    """The tensors that llama.cpp expects of a llama."""
    d, kv = config.n_embd, config.n_head_kv * config.head_dim
    table = [TensorPlan("token_embd.weight", quant, (d, config.n_vocab))]
    for i in range(config.n_layer):
        table.append(TensorPlan(f"blk.{i}.attn_norm.weight", "f32", (d,)))
        for name, row, n in (("attn_q", d, d), ("attn_k", d, kv), ("attn_v", d, kv), ("attn_output", d, d)):
            table.append(TensorPlan(f"blk.{i}.{name}.weight", quant, (row, n)))
        table.append(TensorPlan(f"blk.{i}.ffn_norm.weight", "f32", (d,)))
        for name, row, n in (("ffn_gate", d, config.n_ff), ("ffn_up", d, config.n_ff), ("ffn_down", config.n_ff, d)):
            table.append(TensorPlan(f"blk.{i}.{name}.weight", quant, (row, n)))
    table.append(TensorPlan("output_norm.weight", "f32", (d,)))
    return table if config.tied else [*table, TensorPlan("output.weight", quant, (d, config.n_vocab))]


def decode_bytes(shape: Shape, quant: str) -> int:
    """What llama.cpp reads of the plain file for one token: everything but an embedding that is not the output, too."""
    config = plain_config(shape)
    return sum(plan.n_bytes for plan in plain_table(config, quant) if config.tied or plan.name != "token_embd.weight")


def _write(output: Path, metadata: dict[str, Any], table: list[TensorPlan], drawn: Drawn) -> None:
    with atomic_write(output, force=True) as file:
        write_gguf(file, metadata, table, (drawn.tensor(plan) for plan in table))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write an artifact, or a plain GGUF file, of a well-known shape.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("quant", choices=QUANTS)
    parser.add_argument("active", help="share of the neurons that fire, or plain: a dense file for llama.cpp")
    parser.add_argument("output", type=Path)
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    given = parser.parse_args()
    shape = SHAPES[given.shape]
    shape = replace(shape, n_layer=given.layers or shape.n_layer)
    if given.active == "plain":
        write_plain(shape, given.quant, given.output)
    else:
        write_shape(shape, given.quant, float(given.active), given.output)


if __name__ == "__main__":
    main()
