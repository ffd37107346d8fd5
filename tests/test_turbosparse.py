"""TurboSparse-Mistral's own predictors, from a folder to logits: only neurons that they let through are computed."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from powerinfer_tools.artifact import Artifact
from powerinfer_tools.artifact.layout import INPUT_STREAM, MODE_GATE, MODE_PREDICTOR
from powerinfer_tools.artifact.pwri_writer import write_pwri
from powerinfer_tools.build import Stage, build
from powerinfer_tools.checkpoint import open_checkpoint
from powerinfer_tools.engine import Engine, native
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.progress import silent
from tests.artifact.test_pwri_writer import parts_of
from tests.families.definitions import Weights, decode
from tests.families.test_bamboo import drelu, foreseen
from tests.pwri import write_counts
from tests.test_first_powerinfer import MACHINE, nmse
from tests.tiny import CORPUS
from tests.tiny_families import make_bamboo

SHAPE = {"n_layer": 12, "n_embd": 120, "n_ff": 168, "n_head": 3, "n_head_kv": 1}
TOKENS = torch.randint(300, (8,), generator=torch.Generator().manual_seed(68))  # far from the threshold, see MARGIN
MARGIN = 5e-4  # more than keys and values in float16 change a logit by


def made(folder: Path) -> Path:
    """The model, a third of whose neurons have logits of exactly 0: sigmoid is 1/2, which rounds to 0."""
    folder = make_bamboo(folder, predictor=16, **SHAPE)
    tensors = load_file(folder / "model.safetensors")
    for name, matrix in tensors.items():
        if name.endswith("predictor.fc2.weight"):
            matrix[::3] = 0
    save_file(tensors, folder / "model.safetensors")
    return folder


def decided(folder: Path) -> tuple[npt.NDArray[np.float32], list[int]]:
    """The published model's logits, and how many neurons a layer take part."""
    taking_part: list[int] = []

    def mlp(weights: Weights, base: str, x: Tensor, stream: Tensor) -> Tensor:
        fc1, fc2 = (weights[f"{base}.predictor.fc{part}.weight"] for part in (1, 2))
        logits = (stream @ fc1.T).relu() @ fc2.T
        assert logits[logits != 0].abs().min() > MARGIN
        taking_part.append(int((logits > 0).sum()))
        return foreseen(weights, base, x, stream)

    return decode(folder, TOKENS, mlp).numpy(), taking_part


def built(folder: Path, tmp_path: Path, **options: Any) -> Artifact:
    if not (tmp_path / "counts").exists():
        write_counts(tmp_path / "counts", SHAPE["n_layer"], SHAPE["n_ff"])
    given: dict[str, Any] = {"counts": tmp_path / "counts", "quant": "f32", "machine": MACHINE, "progress": silent}
    return build(folder, [], tmp_path / "m.gguf", **{**given, **options})


def score(artifact: Artifact) -> npt.NDArray[np.float32]:
    with Engine(artifact.path) as engine:
        return engine.score(TOKENS.tolist())[0]


@pytest.mark.parametrize("kernels", [which for which in (1, 2, 3) if native.kernels(which)])
def test_the_artifact_computes_what_is_published(kernels: int, tmp_path: Path) -> None:
    folder = made(tmp_path / "model")
    artifact = built(folder, tmp_path)
    assert set(artifact.modes) == {MODE_PREDICTOR}
    assert artifact.predictor_input == INPUT_STREAM
    expected, taking_part = decided(folder)
    assert nmse(decode(folder, TOKENS, drelu).numpy(), expected) > 0.01
    with Engine(artifact.path, kernels=kernels) as engine:
        decoded = np.array([engine.decode(token, logits=True) for token in TOKENS.tolist()])
        n_computed = engine.stats().neurons_computed
    with Engine(artifact.path, kernels=kernels) as engine:
        scored, scores = engine.score(TOKENS.tolist())
    assert n_computed == sum(taking_part)
    assert [score.n_predicted for score in scores] == taking_part
    assert max(nmse(decoded, expected), nmse(scored, expected)) < 1e-6


def test_a_text_profiles_it_and_its_predictors_stay(tmp_path: Path) -> None:
    folder, text = made(tmp_path / "model"), tmp_path / "text.txt"
    text.write_text(CORPUS * 8)
    stages: list[Stage] = []
    artifact = build(
        folder,
        [text],
        tmp_path / "m.gguf",
        n_tokens=512,
        quant="f32",
        machine=MACHINE,
        progress=silent,
        report=stages.append,
    )
    assert [stage.name for stage in stages] == ["profile", "predictors", "place", "split"]
    assert nmse(score(artifact), decided(folder)[0]) < 1e-6


def test_it_goes_to_the_first_powerinfer_and_back(tmp_path: Path) -> None:
    """Whose logits are to reach the threshold: the least number above 0 lets the same neurons through."""
    folder = made(tmp_path / "model")
    there = tmp_path / "m.powerinfer.gguf"
    write_pwri(*parts_of(folder, folder, tmp_path), there, progress=silent)
    back = build(there, [], tmp_path / "m.gguf", machine=MACHINE, progress=silent)
    with Engine(back.path) as engine:
        scores = engine.score(TOKENS.tolist())[1]
    assert [score.n_predicted for score in scores] == decided(folder)[1]


def test_without_predictors_it_is_plain_drelu(tmp_path: Path) -> None:
    folder = make_bamboo(tmp_path / "model", **SHAPE)
    artifact = built(folder, tmp_path)
    assert set(artifact.modes) == {MODE_GATE}
    assert nmse(score(artifact), decode(folder, TOKENS, drelu).numpy()) < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc2": None}, r"expected model.layers.7.mlp.predictor.fc2.weight, half of a predictor, found none"),
        ({"fc1": torch.ones(16, 119)}, r"expected \[rank, 120\] and \[168, rank\], found \[16, 119\] and \[168, 16\]"),
        ({"fc1": torch.ones(0, 120), "fc2": torch.ones(168, 0)}, r"found \[0, 120\] and \[168, 0\]"),
        ({"fc1": torch.tensor(1.0)}, r"found \[\] and \[168, 16\]"),
        ({"fc1": torch.ones(16, 120).to(torch.int32)}, r"predictor.fc1.weight: expected type .*, found I32"),
    ],
)
def test_a_damaged_predictor_is_refused(change: dict[str, torch.Tensor | None], message: str, tmp_path: Path) -> None:
    folder = made(tmp_path / "model")
    named = {f"model.layers.7.mlp.predictor.{part}.weight": matrix for part, matrix in change.items()}
    tensors = load_file(folder / "model.safetensors") | named
    save_file({name: m for name, m in tensors.items() if m is not None}, folder / "model.safetensors")
    with pytest.raises(PowerinferError, match=message):
        open_checkpoint(folder)
