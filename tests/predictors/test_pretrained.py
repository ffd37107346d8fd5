"""Predictors of the first PowerInfer, of its model files and of model_N.pt, taken over as they are."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from powerinfer_tools.activations import take_counts
from powerinfer_tools.artifact.layout import INPUT_STREAM, MODE_PREDICTOR, LayerPlan
from powerinfer_tools.checkpoint import open_checkpoint
from powerinfer_tools.describe import describe
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.predictors import Predictors, open_pretrained, take_predictors
from tests import pwri
from tests.pwri import Model, write_counts
from tests.tiny import make_llama

N_LAYER, N_EMBD, N_FF, RANK = 12, 32, 64, 24
Matrices = list[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]


def write_pretrained(folder: Path, threshold: float | None = None) -> Matrices:
    """model_<i>.pt of every layer, as the converter reads them; returns fc1 and fc2 of each."""
    folder.mkdir()
    rng = np.random.default_rng(1)
    layers: Matrices = []
    for i in range(N_LAYER):
        fc1, fc2 = rng.standard_normal((RANK, N_EMBD), np.float32), rng.standard_normal((N_FF, RANK), np.float32)
        state = {"fc1.weight": torch.from_numpy(fc1), "fc2.weight": torch.from_numpy(fc2)}
        torch.save(state, folder / f"model_{i}.pt")
        layers.append((fc1, fc2))
    if threshold is not None:
        (folder / "config.json").write_text(json.dumps({"sparse_threshold": threshold}))
    return layers


def taken(source: Path, tmp_path: Path) -> Predictors:
    model = make_llama(tmp_path / "model", n_layer=N_LAYER, n_embd=N_EMBD, n_ff=N_FF)
    return taken_for(model, source, tmp_path)


def taken_for(model: Path, source: Path, tmp_path: Path) -> Predictors:
    checkpoint = open_checkpoint(model)
    if not (tmp_path / "activation").exists():
        write_counts(tmp_path / "activation", checkpoint.config.n_layer, checkpoint.config.n_ff)
    activations = take_counts(checkpoint, tmp_path / "activation", tmp_path / "m.activations")
    return take_predictors(checkpoint, activations, open_pretrained(source, checkpoint), tmp_path / "m.predictors")


@pytest.mark.parametrize("threshold", [None, 0.5, -2.0])
def test_a_folder_is_taken_as_it_is(threshold: float | None, tmp_path: Path) -> None:
    layers = write_pretrained(tmp_path / "old", threshold)
    predictors = taken(tmp_path / "old", tmp_path)
    assert predictors.relu
    assert predictors.input == INPUT_STREAM
    assert predictors.plans == [LayerPlan(MODE_PREDICTOR, RANK)] * N_LAYER
    for i, (fc1, fc2) in enumerate(layers):
        w_in, w_out, bias = predictors.weights(i)
        np.testing.assert_array_equal(w_in, fc1)
        np.testing.assert_array_equal(w_out, fc2)
        np.testing.assert_array_equal(bias, -(threshold or 0.0))
    assert describe(tmp_path / "m.predictors", check=True)["verified"]


def test_a_model_file_is_taken_as_it_is(tmp_path: Path) -> None:
    model = Model(threshold=0.25)
    path = model.write(tmp_path / "old.gguf")
    predictors = taken_for(path, path, tmp_path)
    assert [plan.rank for plan in predictors.plans] == [*pwri.RANKS] * (pwri.N_LAYER // 2)
    w_in, w_out, bias = predictors.weights(11)
    np.testing.assert_array_equal(w_in, model.used["blk.11.fc1.weight"])
    np.testing.assert_array_equal(w_out, model.used["blk.11.fc2.weight"])
    np.testing.assert_array_equal(bias, np.float32(-0.25))


def changed(**weights: Any) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        state = torch.load(path, weights_only=True)
        named = {f"{name}.weight": value for name, value in weights.items()}
        torch.save({key: value for key, value in (state | named).items() if value is not None}, path)

    return change


def flipped(mark: bytes, offset: int) -> Callable[[Path], object]:
    """Sets the byte so far behind a mark."""

    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[data.index(mark) + offset] = 0xFF
        path.write_bytes(data)

    return change


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "expected the predictor of layer 7, found no such file"),
    "no fc2": (changed(fc2=None), "expected fc1.weight and fc2.weight, found fc1.weight"),
    "one more": (changed(fc3=torch.ones(1)), "expected fc1.weight and fc2.weight, found fc1.weight, fc2.weight, fc3"),
    "other inputs": (changed(fc1=torch.ones(RANK, 31)), r"fc1.weight: expected numbers of shape \[24, 32\], found"),
    "other ranks": (changed(fc1=torch.ones(8, N_EMBD)), r"fc2.weight: expected numbers of shape \[64, 8\], found"),
    "a vector": (changed(fc1=torch.ones(RANK)), r"fc1.weight: expected numbers of shape \[1, 32\], found \[24\]"),
    "no rank": (changed(fc1=torch.ones(0, N_EMBD), fc2=torch.ones(64, 0)), "expected 1 to 16384 rows, found 0"),
    "a huge rank": (changed(fc1=torch.zeros(1).expand(1 << 27, N_EMBD)), "expected 1 to 16384 rows, found 134217728"),
    "sparse": (changed(fc1=torch.ones(RANK, N_EMBD).to_sparse()), "fc1.weight: expected numbers of shape"),
    "without memory": (changed(fc1=torch.ones(RANK, N_EMBD, device="meta")), "fc1.weight: expected numbers of shape"),
    "no numbers": (changed(fc1=torch.full((RANK, N_EMBD), torch.nan)), "fc1.weight: expected finite numbers"),
    "no state": (lambda path: torch.save([1, 2], path), "expected fc1.weight and fc2.weight, found list"),
    "a damaged list of records": (flipped(b"PK\x01\x02", 6), "expected an archive, found NotImplementedError"),
    "damaged": (lambda path: path.write_bytes(path.read_bytes()[:-300]), "expected tensors as torch.save writes them"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_predictor_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    change, message = REFUSED[name]
    write_pretrained(tmp_path / "old")
    change(tmp_path / "old" / "model_7.pt")
    with pytest.raises(PowerinferError, match=message) as caught:
        taken(tmp_path / "old", tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'old' / 'model_7.pt'}: ")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "m.predictors").exists()


def test_predictors_of_a_deeper_model_are_refused(tmp_path: Path) -> None:
    write_pretrained(tmp_path / "old")
    (tmp_path / "old" / "model_12.pt").write_bytes((tmp_path / "old" / "model_0.pt").read_bytes())
    with pytest.raises(PowerinferError, match=r"model_12.pt: expected predictors of 12 layers, found more"):
        taken(tmp_path / "old", tmp_path)


def test_a_threshold_that_is_none_is_refused(tmp_path: Path) -> None:
    write_pretrained(tmp_path / "old")
    (tmp_path / "old" / "config.json").write_text('{"sparse_threshold": "high"}')
    with pytest.raises(PowerinferError, match=r"config.json: sparse_threshold: expected a number, found 'high'"):
        taken(tmp_path / "old", tmp_path)


def test_predictors_of_another_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PowerinferError, match=r"old.gguf: expected layers, n_embd and n_ff \(12, 32, 64\), found"):
        taken(Model().write(tmp_path / "old.gguf"), tmp_path)


def test_a_model_that_is_never_zero_takes_none(tmp_path: Path) -> None:
    write_pretrained(tmp_path / "old")
    model = make_llama(tmp_path / "silu", n_layer=N_LAYER, n_embd=N_EMBD, n_ff=N_FF, activation="silu")
    with pytest.raises(PowerinferError, match="silu is never exactly zero: a predictor made for ReLU"):
        taken_for(model, tmp_path / "old", tmp_path)


def test_another_checkpoint_has_none(tmp_path: Path) -> None:
    from tests.tiny_gguf import make_gguf

    other = make_gguf(tmp_path / "new.gguf", make_llama(tmp_path / "other"))
    with pytest.raises(
        PowerinferError, match=r"expected a model file of the first PowerInfer or a folder of model_N.pt"
    ):
        taken(other, tmp_path)
