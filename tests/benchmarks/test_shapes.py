"""Planted models run in the engine as they were planted; llama.cpp's files are of equal bytes and equal weights."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

from benchmarks.default import write_requantised
from benchmarks.shapes import Shape, decode_bytes, plain_config, plain_table, write_plain, write_shape
from powerinfer_tools.engine import Engine, Stats
from tests.tiny import make_llama
from tests.tiny_gguf import make_gguf

ACTIVE = 0.1
LLAMA = Shape("tiny llama", 2, 128, 960, 4, 2, n_vocab=320, n_ctx=128)
OPT = Shape("tiny opt", 2, 128, 960, 4, 4, arch="opt", n_vocab=320, n_ctx=128, tied=True)
FALCON = Shape("tiny falcon", 2, 128, 960, 4, 2, arch="falcon", n_vocab=320, n_ctx=128)
SHAPES = pytest.mark.parametrize("shape", [LLAMA, OPT, FALCON], ids=lambda shape: shape.arch)


def decode(path: Path, mode: str, n: int = 100) -> Stats:
    with Engine(path, ctx_size=128, threads=2, mode=mode) as engine:
        for token in np.random.default_rng(0).integers(0, 320, n):
            engine.decode(int(token))
        return engine.stats()


@SHAPES
@pytest.mark.parametrize("quant", ["q4_0", "f16"])
def test_fires_what_was_planted(tmp_path: Path, shape: Shape, quant: str) -> None:
    write_shape(shape, quant, ACTIVE, tmp_path / "m.gguf")
    sparse = decode(tmp_path / "m.gguf", "auto")
    assert sparse.active_ratio == pytest.approx(ACTIVE, abs=0.02)
    assert sparse.neurons_computed == sparse.neurons_active  # a predictor without error
    assert decode(tmp_path / "m.gguf", "dense").active_ratio == 1


@SHAPES
def test_neurons_fire_as_often_as_planted_and_not_always_the_same(tmp_path: Path, shape: Shape) -> None:
    write_shape(shape, "q8_0", ACTIVE, tmp_path / "m.gguf")
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}

    def read(name: str) -> np.ndarray:
        return dequantize(tensors[f"blk.1.{name}"].data, tensors[f"blk.1.{name}"].tensor_type)

    frequency = read("ffn_frequency.weight")
    assert frequency.mean() == pytest.approx(ACTIVE, rel=1e-3)
    assert (np.diff(frequency) < 0).all()
    x = np.random.default_rng(0).standard_normal((2000, shape.n_embd)).astype(np.float32)
    fires = x @ read("predictor_in.weight").T @ read("predictor_out.weight").T + read("predictor_out.bias") >= 0
    assert np.abs(fires.mean(0) - frequency).max() < 0.12  # one neuron's row may be longer than the mean of rows
    again = (fires[:-1] & fires[1:]).sum() / fires[1:].sum()
    assert ACTIVE < again < 0.6


@SHAPES
@pytest.mark.parametrize("quant", ["q4_0", "q8_0"])
def test_llama_cpps_file_is_a_llama_of_equal_bytes(tmp_path: Path, shape: Shape, quant: str) -> None:
    write_plain(shape, quant, tmp_path / "plain.gguf")
    reader = gguf.GGUFReader(tmp_path / "plain.gguf")
    assert reader.fields["general.architecture"].contents() == "llama"
    assert {t.tensor_type.name.lower() for t in reader.tensors if len(t.shape) == 2} == {quant}
    assert {t.name: tuple(t.shape) for t in reader.tensors} == {
        plan.name: plan.shape for plan in plain_table(plain_config(shape), quant)
    }
    write_shape(shape, quant, ACTIVE, tmp_path / "m.gguf")
    dense = decode(tmp_path / "m.gguf", "dense", n=1)
    assert decode_bytes(shape, quant) == pytest.approx(dense.bytes_decode, rel=0.05)  # biases weigh on a tiny model


@pytest.mark.parametrize("quant", ["q4_0", "q8_0"])
def test_requantised_weights_are_the_published_ones(tmp_path: Path, quant: str) -> None:
    folder = make_llama(tmp_path / "hf", n_layer=1, n_ff=128, tied=True)
    source = make_gguf(tmp_path / "published.gguf", folder, gguf.GGMLQuantizationType.Q4_1)
    write_requantised(source, quant, tmp_path / "again.gguf")
    published = {t.name: dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(source).tensors}
    again = gguf.GGUFReader(tmp_path / "again.gguf")
    assert {t.name for t in again.tensors} == published.keys()
    for tensor in again.tensors:
        expected = published[tensor.name]
        step = np.abs(expected).max() / (7 if quant == "q4_0" else 127)
        np.testing.assert_allclose(dequantize(tensor.data, tensor.tensor_type), expected, atol=step)
    assert (
        again.fields["llama.rope.freq_base"].contents()
        == gguf.GGUFReader(source).fields["llama.rope.freq_base"].contents()
    )
