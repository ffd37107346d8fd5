"""Mixtures of experts in the native engine, beyond what test_structure.py asks of every structure."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from powerinfer_tools.checkpoint import Experts
from powerinfer_tools.engine import DiskLimits, Engine
from tests.artifacts import write_artifact
from tests.drawn import DrawnCheckpoint, drawn_config
from tests.engine.test_disk import run, same
from tests.engine.test_engine import KERNELS, decode_all, ids, nmse, reference_logits

MODELS: dict[str, dict[str, Any]] = {
    "one": {"experts": Experts(8, 1, "softmax", "ffn_input")},
    "all": {"experts": Experts(4, 4, "softmax", "layer_input")},
    "plain": {"experts": Experts(5, 3, "sigmoid", "layer_input"), "gated": False},
    "cut": {"experts": Experts(5, 2, "softmax", "ffn_input"), "activation": "silu", "thresholds": (0.1, 0.2)},
}


@pytest.mark.parametrize("name", MODELS)
def test_only_neurons_of_chosen_experts_are_touched(name: str, tmp_path: Path) -> None:
    checkpoint, tokens = DrawnCheckpoint(drawn_config(**MODELS[name])), ids(24)
    config, experts = checkpoint.config, checkpoint.config.experts
    write_artifact(checkpoint, tmp_path / "gate.gguf")
    write_artifact(checkpoint, tmp_path / "predictor.gguf", predictor=True, rank=64, always=0, slack=1e6)
    layers, row = len(tokens) * config.n_layer, 4 * config.n_embd
    asked = layers * config.n_ff * experts.n_used // experts.n
    expected = reference_logits(checkpoint, tokens)
    for artifact, mode in (("gate", "gate"), ("gate", "dense"), ("predictor", "predictor"), ("predictor", "dense")):
        with Engine(tmp_path / f"{artifact}.gguf", mode=mode) as engine:
            found = np.array([engine.decode(token, logits=True) for token in tokens])
            stats = engine.stats()
        assert nmse(found, expected) <= (1e-4 if name == "cut" else 1e-6)  # a value at the threshold falls anywhere
        assert stats.neurons_computed == asked
        assert stats.bytes_gate == asked * row
        router, forecasts = layers * experts.n * row, layers * 64 * row + asked * (4 * 64 + 4)
        assert stats.bytes_predictor == router + (forecasts if mode == "predictor" else 0)


@pytest.mark.parametrize("mode", ["auto", "gate", "dense"])
@pytest.mark.parametrize("predictor", [False, True])
def test_a_model_on_disk_reads_chosen_experts_only(predictor: bool, mode: str, tmp_path: Path) -> None:
    experts = Experts(8, 2, "sigmoid", "layer_input")
    checkpoint = DrawnCheckpoint(drawn_config(n_layer=3, n_embd=96, n_ff=352, head_dim=24, experts=experts))
    path = write_artifact(checkpoint, tmp_path / "a.gguf", quant="q8_0", predictor=predictor, rank=32, slack=0.02).path
    expected = run(path, None, mode=mode, threads=1)
    for threads in (1, 3):
        found = run(path, DiskLimits((0, 40, 200), 24, 400), mode=mode, threads=threads)
        same(found, expected)
        assert found[-1].neurons_disk > 0
    same(run(path, DiskLimits((0, 40, 200), 0, 5), mode=mode, threads=2), expected)  # too little room: read whole


@pytest.mark.parametrize("quant", ["f32", "q8_0", "q4_0"])
@pytest.mark.parametrize("kernels", KERNELS)
def test_prompt_may_be_cut_anywhere(quant: str, kernels: int, tmp_path: Path) -> None:
    experts = Experts(3, 2, "softmax", "ffn_input")
    checkpoint = DrawnCheckpoint(drawn_config(n_embd=96, n_ff=3 * 300, head_dim=24, experts=experts))
    write_artifact(checkpoint, tmp_path / "a.gguf", quant=quant)
    prompt = ids(200)
    with Engine(tmp_path / "a.gguf", kernels=kernels) as engine:
        whole = engine.prefill(prompt, logits=True)
        engine.truncate(0)
        engine.prefill(prompt[:1])
        engine.prefill(prompt[1:131])
        assert np.array_equal(engine.prefill(prompt[131:], logits=True), whole)
    assert nmse(decode_all(tmp_path / "a.gguf", prompt, kernels=kernels)[-1], whole) <= (
        1e-6 if quant == "f32" else 3e-4
    )


@pytest.mark.parametrize("routed_by", ["ffn_input", "layer_input"])
@pytest.mark.parametrize("gating", ["softmax", "sigmoid"])
def test_of_equal_experts_the_lower_are_chosen(gating: str, routed_by: str, tmp_path: Path) -> None:
    checkpoint, tokens = DrawnCheckpoint(drawn_config(experts=Experts(8, 3, gating, routed_by))), ids(24)
    for i in range(2):  # experts 0 to 3 are always equal, and so are 4 to 7
        router = checkpoint.tensors[f"blk.{i}.ffn_router.weight"]
        router[:4], router[4:] = router[0], -router[0]
    write_artifact(checkpoint, tmp_path / "a.gguf")
    expected, decoded = reference_logits(checkpoint, tokens), decode_all(tmp_path / "a.gguf", tokens)
    assert nmse(decoded, expected) <= 1e-6
    with Engine(tmp_path / "a.gguf") as engine:
        scored = engine.score(tokens)[0]
    assert nmse(scored, expected) <= 1e-6
    for i in range(2):  # the fourth of each is never asked
        gate = checkpoint.tensors[f"blk.{i}.ffn_gate.weight"]
        gate[60:80] = gate[140:] = 1
    write_artifact(checkpoint, tmp_path / "a.gguf")
    assert np.array_equal(decode_all(tmp_path / "a.gguf", tokens), decoded)
    assert np.array_equal(reference_logits(checkpoint, tokens), expected)
