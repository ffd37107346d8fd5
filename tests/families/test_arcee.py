"""Arcee AFM against transformers: llama without a gate."""

from pathlib import Path
from typing import Any

import pytest

from powerinfer_tools.checkpoint import open_checkpoint
from powerinfer_tools.errors import PowerinferError
from tests.checkpoint.test_huggingface import edit
from tests.families.test_nemotron import assert_same_model
from tests.reference.test_transformers import assert_equal
from tests.tiny_gguf import make_gguf
from tests.tiny_plain import make_arcee

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SHAPES: dict[str, dict[str, Any]] = {
    "deep, odd": {"n_layer": 12, "n_embd": 120, "n_ff": 161, "n_head": 3, "n_head_kv": 1, "n_vocab": 317},
    "biases, tied": {"bias": True, "tied": True},
    "yarn": {"rope_scaling": YARN},
}


@pytest.mark.parametrize("name", SHAPES)
def test_computes_what_transformers_computes(tmp_path: Path, name: str) -> None:
    assert_equal(make_arcee(tmp_path, **SHAPES[name]))


def test_config(tmp_path: Path) -> None:
    config = open_checkpoint(make_arcee(tmp_path)).config
    assert (config.arch, config.activation, config.gated, config.norm) == ("arcee", "relu2", False, "rms")


def test_refuses_what_takes_a_gate(tmp_path: Path) -> None:
    folder = make_arcee(tmp_path)
    edit(folder / "config.json", hidden_act="drelu")
    with pytest.raises(PowerinferError, match=r"hidden_act: expected one of relu, .*found 'drelu'"):
        open_checkpoint(folder)


def test_gguf_is_the_same_model(tmp_path: Path) -> None:
    folder = make_arcee(tmp_path / "hf", **SHAPES["deep, odd"])
    assert_same_model(make_gguf(tmp_path / "m.gguf", folder, arch="arcee"), folder)
