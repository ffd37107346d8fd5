"""Mixtures of experts in the native engine: as the reference in every mode and tier, and the same for any threads."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from powerinfer_tools.artifact import open_artifact
from powerinfer_tools.checkpoint import Experts
from powerinfer_tools.engine import DiskLimits, Engine
from powerinfer_tools.placement import artifact_costs
from tests.artifacts import write_artifact
from tests.drawn import DrawnCheckpoint, drawn_config
from tests.engine.test_disk import run, same
from tests.engine.test_engine import KERNELS, Rounded, decode_all, greedy_tokens, ids, nmse, reference_logits

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


def test_only_neurons_of_chosen_experts_are_touched(model: tuple[DrawnCheckpoint, Path]) -> None:
    checkpoint, folder = model
    config = checkpoint.config
    tokens = ids(6)
    taking_part = len(tokens) * config.n_layer * config.n_ff * config.taking_part
    for artifact, mode in (("gate", "gate"), ("predictor", "predictor"), ("predictor", "dense")):
        with Engine(folder / f"{artifact}.gguf", mode=mode) as engine:
            for token in tokens:
                engine.decode(token)
            stats = engine.stats()
        assert stats.neurons_computed == taking_part
        assert stats.bytes_gate == taking_part * 4 * config.n_embd
        router = len(tokens) * config.n_layer * config.experts.n * 4 * config.n_embd
        asking = (128 * config.n_embd + 128 + 1) * 4  # at least: w_in, and one neuron's forecast
        assert (stats.bytes_predictor == router) == (mode != "predictor")
        assert mode != "predictor" or stats.bytes_predictor > router + asking


@pytest.mark.parametrize("artifact", ["gate", "predictor"])
def test_memory_is_what_placement_counts(model: tuple[DrawnCheckpoint, Path], artifact: str) -> None:
    opened = open_artifact(model[1] / f"{artifact}.gguf")
    costs = artifact_costs(opened.config, opened.plans, quant="f32", biases=frozenset(), ctx_size=100, threads=2)
    with Engine(opened.path, ctx_size=100, threads=2) as engine:
        assert engine.info.weight_bytes == costs.weights
        assert engine.memory() == (costs.kv, costs.scratch)


@pytest.mark.parametrize("mode", ["auto", "gate", "dense"])
@pytest.mark.parametrize("quant", ["f32", "q8_0", "q4_0"])
@pytest.mark.parametrize("predictor", [False, True])
def test_threads_and_the_disk_change_nothing(quant: str, predictor: bool, mode: str, tmp_path: Path) -> None:
    experts = Experts(8, 2, "sigmoid", "layer_input")
    checkpoint = DrawnCheckpoint(drawn_config(n_layer=3, n_embd=96, n_ff=352, head_dim=24, experts=experts))
    path = tmp_path / "a.gguf"
    write_artifact(checkpoint, path, quant=quant, predictor=predictor, rank=32, slack=0.02)
    expected = run(path, None, mode=mode, threads=1)
    for threads in (2, 3):
        same(run(path, None, mode=mode, threads=threads), expected)
    found = run(path, DiskLimits((0, 40, 200), 24, 400), mode=mode, threads=2)
    same(found, expected)
    assert found[-1].neurons_disk > 0  # in dense mode, too, only the chosen experts' neurons are read
    same(run(path, DiskLimits((0, 40, 200), 0, 5), mode=mode, threads=3), expected)


@pytest.mark.parametrize("quant", ["f16", "q8_0", "q4_0"])
def test_quantised_equals_reference_on_the_same_weights(quant: str, tmp_path: Path) -> None:
    experts = Experts(6, 3, "softmax", "ffn_input")
    checkpoint = Rounded(DrawnCheckpoint(drawn_config(n_embd=128, n_ff=192, head_dim=32, experts=experts)), quant)
    write_artifact(checkpoint, tmp_path / "a.gguf", quant=quant)
    tokens = ids(40)
    expected = reference_logits(checkpoint, tokens)
    with Engine(tmp_path / "a.gguf") as engine:
        scored = engine.score(tokens)[0]
    assert nmse(scored, expected) <= (1e-6 if quant == "f16" else 3e-4)


@pytest.mark.parametrize("routed_by", ["ffn_input", "layer_input"])
@pytest.mark.parametrize("gating", ["softmax", "sigmoid"])
def test_of_equal_experts_the_lower_are_chosen(gating: str, routed_by: str, tmp_path: Path) -> None:
    checkpoint = DrawnCheckpoint(drawn_config(experts=Experts(8, 3, gating, routed_by)))
    for i in range(2):  # experts 0 to 3 are always equal, and so are 4 to 7
        router = checkpoint.tensors[f"blk.{i}.ffn_router.weight"]
        router[:4], router[4:] = router[0], -router[0]
    write_artifact(checkpoint, tmp_path / "a.gguf")
    tokens = ids(24)
    expected = reference_logits(checkpoint, tokens)
    assert nmse(decode_all(tmp_path / "a.gguf", tokens), expected) <= 1e-6
    with Engine(tmp_path / "a.gguf") as engine:
        assert nmse(engine.score(tokens)[0], expected) <= 1e-6
    for i in range(2):  # the fourth of each is never asked
        gate = checkpoint.tensors[f"blk.{i}.ffn_gate.weight"]
        gate[60:80] = gate[140:] = 1
    write_artifact(checkpoint, tmp_path / "b.gguf")
    assert np.array_equal(decode_all(tmp_path / "b.gguf", tokens), decode_all(tmp_path / "a.gguf", tokens))
