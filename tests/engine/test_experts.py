"""Mixtures of experts in the native engine: as the reference in every mode and tier, and the same for any threads."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from powerinfer_tools.artifact import open_artifact
from powerinfer_tools.checkpoint import Experts
from powerinfer_tools.engine import Engine
from powerinfer_tools.engine.engine import DiskLimits
from tests.artifacts import write_artifact
from tests.drawn import DrawnCheckpoint, drawn_config
from tests.engine.test_engine import KERNELS, decode_all, greedy_tokens, ids, nmse, reference_logits

MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"n_layer": 12, "activation": "drelu", "experts": Experts(8, 2, "softmax", "ffn_input"), "n_ff": 8 * 39},
    "smallthinker": {"n_layer": 12, "experts": Experts(16, 4, "sigmoid", "layer_input"), "n_ff": 16 * 21, "tied": True},
    "cut": {"activation": "silu", "thresholds": (0.05, 0.1), "experts": Experts(5, 2, "softmax", "ffn_input")},
    "all": {"experts": Experts(4, 4, "softmax", "layer_input")},
}


@pytest.fixture(params=MODELS, scope="module")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[DrawnCheckpoint, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = DrawnCheckpoint(drawn_config(**MODELS[request.param]))
    write_artifact(checkpoint, folder / "gate.gguf")
    write_artifact(checkpoint, folder / "predictor.gguf", predictor=True, slack=1e6)
    return checkpoint, folder


def test_equals_reference(model: tuple[DrawnCheckpoint, Path]) -> None:
    checkpoint, folder = model
    tokens = ids(40)
    expected = reference_logits(checkpoint, tokens)
    for kernels in KERNELS:
        with Engine(folder / "gate.gguf", mode="dense", kernels=kernels) as engine:
            assert nmse(engine.score(tokens)[0], expected) <= 1e-6
    assert nmse(decode_all(folder / "gate.gguf", tokens), expected) <= 1e-6
    assert nmse(decode_all(folder / "predictor.gguf", tokens), expected) <= 1e-6


def test_same_greedy_tokens_as_reference(model: tuple[DrawnCheckpoint, Path]) -> None:
    checkpoint, folder = model
    prompt = ids(8)
    found = greedy_tokens(folder / "predictor.gguf", prompt, 64)
    expected = reference_logits(checkpoint, prompt + found[:-1])[len(prompt) - 1 :]
    assert found == expected.argmax(-1).tolist()


def test_modes_are_equal_bit_for_bit(model: tuple[DrawnCheckpoint, Path]) -> None:
    _, folder = model
    tokens = ids(24)
    dense = decode_all(folder / "gate.gguf", tokens, mode="dense")
    for artifact, mode in (("gate", "gate"), ("predictor", "dense"), ("predictor", "auto"), ("predictor", "gate")):
        found = decode_all(folder / f"{artifact}.gguf", tokens, mode=mode)
        assert np.array_equal(found, dense), (artifact, mode)
