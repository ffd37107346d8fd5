"""The folder is a checkpoint: for the reference, for build and engine, for transformers if it knows the activation."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from powerinfer_tools.build import build
from powerinfer_tools.checkpoint import Merged, open_checkpoint
from powerinfer_tools.engine import Engine, Sampling, generate
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.placement import Machine, Tier
from powerinfer_tools.progress import silent
from powerinfer_tools.reference import forward
from powerinfer_tools.sparsify import write_folder
from powerinfer_tools.sparsify.write import base_config, stored_names
from tests.reference.test_transformers import assert_equal
from tests.sparsify.conftest import Bench
from tests.tiny import make_llama
from tests.tiny_families import make_bamboo, make_minicpm
from tests.tiny_gguf import make_gguf

MACHINE = Machine("test", 2, Tier(8 << 30, 2e10, ((1 << 10, 1e10), (1 << 16, 2e10))))
GREEDY = Sampling(temperature=0)


@pytest.mark.parametrize("how", [{"tied": True}, {"model_type": "qwen2"}, {"bias": True}])
def test_transformers_computes_the_same_for_relu(bench: Bench, tmp_path: Path, how: dict[str, Any]) -> None:
    bench.model = make_llama(tmp_path / "dense", activation="silu", shards=2, **how)
    result = bench.sparsify(to="relu", n_tokens=1024)
    assert_equal(result.output)


def test_transformers_refuses_a_cut(bench: Bench) -> None:
    from transformers import AutoModelForCausalLM

    result = bench.sparsify(n_tokens=256)
    with pytest.raises(KeyError, match="silu_cut"):
        AutoModelForCausalLM.from_pretrained(result.output)


@pytest.mark.parametrize("to", ["cut", "relu", "fatrelu", "drelu"])
def test_build_and_engine_take_the_folder(bench: Bench, to: str) -> None:
    result = bench.sparsify(to=to, n_tokens=2048)
    artifact = build(
        result.output,
        [bench.text],
        bench.folder / "x.gguf",
        quant="f32",
        n_tokens=512,
        machine=MACHINE,
        progress=silent,
    )
    checkpoint = open_checkpoint(result.output)
    assert artifact.config.activation == checkpoint.config.activation
    np.testing.assert_allclose(artifact.config.thresholds, checkpoint.config.thresholds)
    answers = {}
    for mode in ("gate", "dense"):
        with Engine(artifact.path, mode=mode, threads=2) as engine:
            tokens = generate(engine, [5, 9, 200], GREEDY, max_tokens=24, stop_ids=[], seed=0)
            answers[mode] = [token.id for token in tokens]
            active = engine.stats().active_ratio
    assert answers["gate"] == answers["dense"]
    assert abs(active - sum(result.student.active) / 2) < 0.1
    expected = [5, 9, 200]
    for _ in range(24):
        expected.append(int(forward(checkpoint, torch.tensor([expected]))[0, -1].argmax()))
    assert answers["gate"] == expected[3:]


def test_a_gguf_model_becomes_a_folder(bench: Bench, tmp_path: Path, tokens: torch.Tensor) -> None:
    path = make_gguf(tmp_path / "m.gguf", bench.model, gguf.GGMLQuantizationType.Q8_0)
    base = open_checkpoint(path)
    merged = Merged(base, "silu", (0.1, 0.2), {})
    (tmp_path / "folder").mkdir()
    write_folder(base, merged, tmp_path / "folder")
    written = open_checkpoint(tmp_path / "folder")
    assert replace(written.config, rope=None, name="") == replace(merged.config, rope=None, name="")
    for name in base.names():
        np.testing.assert_array_equal(written.read(name), base.read(name))
    assert torch.equal(forward(written, tokens), forward(merged, tokens))
    assert written.tokenizer_json == base.tokenizer_json
    assert written.chat_template == base.chat_template
    assert written.special == base.special


def test_a_gguf_model_that_no_config_describes(bench: Bench, tmp_path: Path) -> None:
    scaled = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    path = make_gguf(tmp_path / "m.gguf", bench.model, keys=scaled)
    with pytest.raises(PowerinferError, match="expected plain rotary positions in a GGUF file"):
        base_config(open_checkpoint(path))
    biased = make_llama(tmp_path / "biased", activation="silu", bias=True)
    with pytest.raises(PowerinferError, match="expected no biases in a GGUF file"):
        base_config(open_checkpoint(make_gguf(tmp_path / "b.gguf", biased)))


def test_other_families_of_gguf_are_refused(tmp_path: Path) -> None:
    path = make_gguf(tmp_path / "m.gguf", make_bamboo(tmp_path / "hf"), arch="bamboo")
    with pytest.raises(PowerinferError, match="expected a llama GGUF file, found bamboo"):
        base_config(open_checkpoint(path))


def test_folded_tensors_are_refused(tmp_path: Path) -> None:
    """What is read of minicpm has its scales in it: written back, they would be there twice."""
    with pytest.raises(PowerinferError, match=r"stored as they are used, found \S+\.weight put together"):
        stored_names(open_checkpoint(make_minicpm(tmp_path)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "silu_cut"}, "hidden_act_thresholds: expected 2 numbers, not negative, found nothing"),
        ({"hidden_act": "silu_cut", "hidden_act_thresholds": [0.1]}, "expected 2 numbers"),
        ({"hidden_act": "silu_cut", "hidden_act_thresholds": [0.1, -0.1]}, "expected 2 numbers"),
        ({"hidden_act": "silu_cut", "hidden_act_thresholds": [0.1, True]}, "expected 2 numbers"),
        ({"hidden_act": "silu", "hidden_act_thresholds": [0.1, 0.1]}, "one of silu_cut, fatrelu, drelu beside"),
    ],
)
def test_thresholds_that_are_refused(bench: Bench, tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    folder = make_llama(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PowerinferError, match=message):
        open_checkpoint(folder)
