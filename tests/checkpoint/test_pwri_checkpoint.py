"""Models of the first PowerInfer: what is read is what the file's description says; damage costs one line."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from powerinfer_tools import reference
from powerinfer_tools.artifact import open_artifact
from powerinfer_tools.checkpoint import open_checkpoint
from powerinfer_tools.checkpoint.pwri_checkpoint import PwriCheckpoint
from powerinfer_tools.describe import describe
from powerinfer_tools.errors import PowerinferError
from tests import pwri
from tests.gguf_bytes import F16, Q4_0, scalar, text
from tests.pwri import Model

ARCHITECTURES = {"llama": "relu", "bamboo": "drelu", "opt": "relu", "falcon": "relu"}


def opened(path: Path) -> PwriCheckpoint:
    checkpoint = open_checkpoint(path)
    assert isinstance(checkpoint, PwriCheckpoint)
    return checkpoint


@pytest.mark.parametrize("kind", [F16, Q4_0])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_model_is_what_the_description_says(arch: str, kind: int, tmp_path: Path) -> None:
    model = Model(arch, kind)
    checkpoint = opened(model.write(tmp_path / "old.gguf"))
    assert checkpoint.config.activation == ARCHITECTURES[arch]
    assert checkpoint.config.n_ctx == pwri.N_CTX
    assert not checkpoint.notes
    found = reference.forward(checkpoint, torch.tensor([pwri.TOKENS]))[0].numpy()
    np.testing.assert_allclose(found, model.forward(pwri.TOKENS, "none", cache="<f8")[0], atol=1e-4)


def test_predictors_and_their_threshold_are_read(tmp_path: Path) -> None:
    for threshold, expected in ((None, 0.0), (-1.5, -1.5)):
        model = Model(threshold=threshold)
        predictors = opened(model.write(tmp_path / "old.gguf")).predictors
        assert predictors is not None
        assert predictors.threshold == expected
        assert predictors.ranks == [*pwri.RANKS] * (pwri.N_LAYER // 2)
        for i in (0, 11):
            for k, matrix in enumerate(predictors.layer(i)):
                np.testing.assert_array_equal(matrix, model.used[f"blk.{i}.fc{k + 1}.weight"])


def test_the_generated_index_is_not_needed(tmp_path: Path) -> None:
    path = Model().write(tmp_path / "old.gguf")
    (tmp_path / "old.gguf.generated.gpuidx").write_bytes(b"PWRI")
    assert "gpuidx" in open_checkpoint(path).notes[0]


def test_inspect_lists_it(tmp_path: Path) -> None:
    path = Model(threshold=0.5).write(tmp_path / "old.gguf")
    found = describe(path)
    assert (found["kind"], found["activation"], found["n_layer"]) == ("checkpoint", "relu", pwri.N_LAYER)
    assert found["predictor_threshold"] == 0.5
    assert found["predictor_ranks"] == "32 to 64"
    assert f"powerinfer build {path}" in found["convert"]


def test_an_artifact_is_asked_for_and_the_way_to_one_named(tmp_path: Path) -> None:
    path = Model().write(tmp_path / "old.gguf")
    with pytest.raises(
        PowerinferError, match=rf"first PowerInfer; convert it with: powerinfer build {path} -o NEW.gguf"
    ):
        open_artifact(path)


def swapped(old: bytes, new: bytes) -> Callable[[Model], bytes]:
    def file(model: Model) -> bytes:
        whole = model.file()
        assert whole.count(old) == 1
        return whole.replace(old, new)

    return file


REFUSED: dict[str, tuple[Callable[[Model], bytes], str]] = {
    "cut in its tensors": (lambda model: model.file()[:-100], r"blk.11.fc2.weight: expected data up to byte \d+"),
    "cut in its header": (lambda model: model.file()[:5000], "found the end of the file at byte 5000"),
    "another magic": (lambda model: model.file(b"PWRX"), "expected a GGUF file, found one that begins with b'PWRX'"),
    "no fc2": (lambda model: model.file(without="blk.3.fc2.weight"), "expected blk.3.fc2.weight, half of a predictor"),
    "no fc1": (lambda model: model.file(without="blk.0.fc1.weight"), "expected blk.0.fc1.weight, half of a predictor"),
    "no down": (lambda model: model.file(without="blk.2.ffn_down_t.weight"), r"expected blk.2.ffn_down_t.weight"),
    "dense": (swapped(b"blk.7.ffn_down_t.weight", b"blk.7.ffn_down_x.weight"), r"expected blk.7.ffn_down_t.weight"),
    "another architecture": (
        swapped(text(b"general.architecture", b"llama"), text(b"general.architecture", b"refac")),
        "general.architecture: expected one of bamboo, falcon, llama, opt, found 'refac'",
    ),
    "a threshold that is none": (
        swapped(
            scalar(b"powerinfer.sparse_threshold", pwri.FLOAT32, 0.25),
            scalar(b"powerinfer.sparse_threshold", pwri.FLOAT32, float("nan")),
        ),
        "powerinfer.sparse_threshold: expected a finite number, found nan",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_damage_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    make, message = REFUSED[name]
    path = tmp_path / "old.gguf"
    path.write_bytes(make(Model(threshold=0.25)))
    with pytest.raises(PowerinferError, match=message) as caught:
        open_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_predictor_of_other_sizes_is_refused(tmp_path: Path) -> None:
    model = Model()
    kind, _, data = model.stored["blk.4.fc2.weight"]
    model.stored["blk.4.fc2.weight"] = kind, (16, 2 * pwri.N_FF), data
    with pytest.raises(PowerinferError, match=r"blk.4.fc1.weight and blk.4.fc2.weight: expected \[rank, 64\]"):
        open_checkpoint(model.write(tmp_path / "old.gguf"))


def test_weights_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    model = Model()
    kind, shape, data = model.stored["blk.4.fc1.weight"]
    model.stored["blk.4.fc1.weight"] = kind, shape, b"\x00\x7e" + data[2:]
    predictors = opened(model.write(tmp_path / "old.gguf")).predictors
    assert predictors is not None
    with pytest.raises(PowerinferError, match=r"blk.4.fc1.weight: expected finite weights, found nan at \[0, 0\]"):
        predictors.layer(4)
