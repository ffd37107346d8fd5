"""The default model's weights for both engines, in the same type and of equal bytes, from its published GGUF file."""

from pathlib import Path
from typing import Any

import numpy.typing as npt
from gguf import GGUFReader
from gguf.quants import dequantize

from benchmarks.shapes import plain_keys, plain_table
from powerinfer_tools.artifact.gguf_writer import write_gguf
from powerinfer_tools.artifact.layout import TensorPlan
from powerinfer_tools.artifact.weights import quantise
from powerinfer_tools.checkpoint import open_checkpoint
from powerinfer_tools.files import atomic_write
from tests.artifacts import write_artifact


def write_uncut(source: Path, quant: str, output: Path) -> None:
    """Writes our artifact, its activation not cut: every layer in mode gate, which skips nothing of a silu."""
    write_artifact(open_checkpoint(source), output, quant=quant)


def write_requantised(source: Path, quant: str, output: Path) -> None:
    """Writes the file for llama.cpp, without vocabulary, with every matrix in `quant`."""
    checkpoint, reader = open_checkpoint(source), GGUFReader(source)
    theta = reader.fields["llama.rope.freq_base"].contents()
    metadata = plain_keys(checkpoint, quant) | {"llama.rope.freq_base": float(theta)}
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def rows(plan: TensorPlan) -> npt.NDArray[Any]:
        tensor = tensors[plan.name]
        return quantise(plan, dequantize(tensor.data, tensor.tensor_type))

    table = plain_table(checkpoint.config, quant)
    with atomic_write(output, force=True) as file:
        write_gguf(file, metadata, table, (iter([rows(plan)]) for plan in table))
