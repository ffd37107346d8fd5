"""What a model leaves on a device and out of memory: counted, and refused where it cannot be."""

import os
from pathlib import Path

import numpy as np
import pytest

from powerinfer_tools.artifact import open_artifact
from powerinfer_tools.engine import CardLimits, Model
from powerinfer_tools.engine.native import CARD_MEASURES, chunk_bounds, measure_card
from powerinfer_tools.errors import PowerinferError
from tests.artifacts import make_artifact
from tests.tiny import make_llama

N_LAYER, N_FF = 3, 352


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    make_llama(folder / "llama", n_layer=N_LAYER, n_embd=96, n_ff=N_FF, n_head=3, n_head_kv=1, head_dim=32)
    make_artifact(folder / "llama", folder / "llama.gguf", quant="q8_0", predictor=True)
    return folder / "llama.gguf"


def bounds(model: Path) -> list[list[int]]:
    artifact = open_artifact(model)
    return [chunk_bounds(artifact.frequency(i)) for i in range(N_LAYER)]


def test_chunks_end_where_blocks_do_and_share_the_work() -> None:
    frequency = np.sort(np.random.default_rng(0).power(0.3, 11008).astype(np.float32))[::-1]
    found = chunk_bounds(frequency)
    assert found[0] == 0
    assert found[-1] == 11008
    assert all(bound % 32 == 0 for bound in found)
    work = np.add.reduceat(1 + 4 * frequency.astype(np.float64), found[:-1])
    assert work.max() < 1.3 * work.mean()


def test_nothing_lies_twice(model: Path) -> None:
    divided = tuple(bound[len(bound) // 2] for bound in bounds(model))
    for dense, neurons, head in [
        ((True,) * N_LAYER, (N_FF,) * N_LAYER, True),
        ((True, False, True), divided, False),
        ((False,) * N_LAYER, divided, True),
        ((False,) * N_LAYER, (0,) * N_LAYER, False),
    ]:
        info = Model(model, None, CardLimits(dense, neurons, head, device="host")).info
        # a device pads tensors to 256 bytes, all to whole pages, and has the angles' frequencies, as both sides do
        padding = 256 * len(open_artifact(model).file.tensors)
        there = info.weight_bytes - info.resident_bytes
        assert (there > 0) == (info.card_bytes > 0)
        assert there <= info.card_bytes < there + padding + (2 << 20)


def test_a_division_must_fit_the_model(model: Path) -> None:
    with pytest.raises(PowerinferError, match="expected 3 layers, found 2"):
        Model(model, None, CardLimits((True,) * 2, (0,) * 2, device="host"))
    with pytest.raises(PowerinferError, match=r"layer 1's chunks .*, found 33 neurons"):
        Model(model, None, CardLimits((True,) * 3, (0, 33, 0), device="host"))
    with pytest.raises(PowerinferError, match="as many values in dense as in neurons"):
        CardLimits((True,), (0, 32))


def test_a_budget_is_kept(model: Path) -> None:
    everything = CardLimits((True,) * 3, (N_FF,) * 3, True, device="host")
    n_bytes = Model(model, None, everything).info.card_bytes
    Model(model, None, CardLimits((True,) * 3, (N_FF,) * 3, True, budget=n_bytes, device="host"))
    with pytest.raises(PowerinferError, match=rf"expected at most {n_bytes - 1} bytes, found .* {n_bytes} of weights"):
        Model(model, None, CardLimits((True,) * 3, (N_FF,) * 3, True, budget=n_bytes - 1, device="host"))


def test_an_install_without_the_cuda_part_says_how_to_get_it(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "POWERINFER_CUDA_LIB", str(model.parent / "none.so"))
    with pytest.raises(PowerinferError, match=r"no CUDA part of the engine \(make native CUDA=1\)"):
        Model(model, None, CardLimits((False,) * 3, (0,) * 3))


def test_a_device_is_measured() -> None:
    found = {
        what: measure_card(what, "host", buffer_bytes=1 << 22, row_bytes=4096, stride_rows=4) for what in CARD_MEASURES
    }
    assert all(value > 0 for value in found.values())
    assert len(set(found.values())) == len(found)
