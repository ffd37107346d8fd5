"""Counts of the first PowerInfer: which file is which layer's, and what is no count."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from powerinfer_tools.activations import Activations, read_activations, report, take_counts
from powerinfer_tools.checkpoint import open_checkpoint
from powerinfer_tools.describe import describe
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.predictors import train
from tests.pwri import write_counts
from tests.tiny import make_llama

N_LAYER, N_FF = 12, 64


def taken(folder: Path, output: Path | None = None) -> Activations:
    model = make_llama(folder.parent / "model", n_layer=N_LAYER, n_embd=32, n_ff=N_FF)
    return take_counts(open_checkpoint(model), folder, output or folder.parent / "m.activations")


def test_the_number_in_a_name_is_the_layer(tmp_path: Path) -> None:
    counts = write_counts(tmp_path / "activation", N_LAYER, N_FF)
    activations = taken(tmp_path / "activation")
    for i in range(N_LAYER):  # sorted by name, 10 and 11 would come before 2
        np.testing.assert_array_equal(activations.counts(i), counts[i])
    assert activations.n_tokens == counts.max()
    assert activations.n_samples == 0


def test_they_are_a_file_like_any_other(tmp_path: Path) -> None:
    write_counts(tmp_path / "activation", N_LAYER, N_FF)
    taken(tmp_path / "activation")
    path = tmp_path / "m.activations"
    assert describe(path, check=True)["verified"]
    assert 0 < report(read_activations(path))["active_share"] <= 1


def test_shares_count_as_well(tmp_path: Path) -> None:
    counts = write_counts(tmp_path / "activation", N_LAYER, N_FF)
    for i in range(N_LAYER):
        torch.save(torch.from_numpy(counts[i] / 1e6), tmp_path / "activation" / f"activation_{i}.pt")
    activations = taken(tmp_path / "activation")
    for i in range(N_LAYER):
        np.testing.assert_allclose(activations.frequency(i), counts[i] / counts.max(), atol=1e-6)


def test_they_are_no_samples_to_train_with(tmp_path: Path) -> None:
    write_counts(tmp_path / "activation", N_LAYER, N_FF)
    activations = taken(tmp_path / "activation")
    with pytest.raises(PowerinferError, match=r"m.activations: holds counts alone.*powerinfer profile"):
        train(open_checkpoint(tmp_path / "model"), activations, tmp_path / "m.predictors")


class Code:
    """What a pickle with code in it looks like."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def saved(value: Any) -> Callable[[Path], object]:
    return lambda path: torch.save(value, path)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "expected the counts of layer 7, found no such file"),
    "too short": (saved(torch.ones(N_FF - 1)), r"counts: expected numbers of shape \[64\], found \[63\]"),
    "a matrix": (saved(torch.ones(1, N_FF)), r"found \[1, 64\]"),
    "no tensor": (saved({"counts": [1] * N_FF}), r"expected numbers of shape \[64\], found none"),
    "negative": (saved(torch.full((N_FF,), -1.0)), "expected counts of at least 0, found -1"),
    "not a number": (saved(torch.full((N_FF,), float("nan"))), "expected finite numbers"),
    "large": (saved(torch.ones(1 << 16)), r"expected at most 512 bytes of tensors, found \d+"),
    "damaged": (lambda path: path.write_bytes(path.read_bytes()[:-200]), "expected tensors as torch.save writes them"),
    "text": (lambda path: path.write_text("1 2 3"), "expected tensors as torch.save writes them and no code"),
    "empty": (lambda path: path.write_bytes(b""), "expected tensors as torch.save writes them and no code"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_count_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    change, message = REFUSED[name]
    folder = tmp_path / "activation"
    write_counts(folder, N_LAYER, N_FF)
    change(folder / "activation_7.pt")
    with pytest.raises(PowerinferError, match=message) as caught:
        taken(folder)
    assert str(caught.value).startswith(f"{folder / 'activation_7.pt'}: ")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "m.activations").exists()


def test_code_is_not_run(tmp_path: Path) -> None:
    write_counts(tmp_path / "activation", N_LAYER, N_FF)
    torch.save(Code(tmp_path / "run"), tmp_path / "activation" / "activation_3.pt")
    with pytest.raises(
        PowerinferError, match=r"activation_3.pt: expected tensors as torch.save writes them and no code"
    ):
        taken(tmp_path / "activation")
    assert not (tmp_path / "run").exists()


def test_counts_of_a_deeper_model_are_refused(tmp_path: Path) -> None:
    write_counts(tmp_path / "activation", N_LAYER + 1, N_FF)
    with pytest.raises(PowerinferError, match=r"activation_12.pt: expected counts of 12 layers, found those of more"):
        taken(tmp_path / "activation")


def test_counts_of_nothing_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "activation"
    folder.mkdir()
    for i in range(N_LAYER):
        torch.save(torch.zeros(N_FF), folder / f"activation_{i}.pt")
    with pytest.raises(PowerinferError, match="expected counts of neurons that fire, found none above 0"):
        taken(folder)
