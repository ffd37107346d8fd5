"""Every structural field of Config in the native engine: against the reference, and against itself."""

from pathlib import Path

import numpy as np
import pytest

from powerinfer_tools.artifact import open_artifact
from powerinfer_tools.engine import DiskLimits, Engine, Model
from powerinfer_tools.engine.native import check_artifact
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.placement import artifact_costs
from tests.artifacts import write_artifact
from tests.drawn import STRUCTURES, DrawnCheckpoint, drawn_config
from tests.engine.test_engine import (
    GREEDY,
    KERNELS,
    Rounded,
    damage,
    decode_all,
    greedy_tokens,
    ids,
    nmse,
    reference_logits,
)

Structure = tuple[DrawnCheckpoint, Path]
BIASES = ("attn_q", "attn_output", "ffn_up", "ffn_down")


def drawn(name: str) -> DrawnCheckpoint:
    return DrawnCheckpoint(drawn_config(**STRUCTURES[name]), BIASES)


@pytest.fixture(params=STRUCTURES, scope="module")
def structure(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Structure:
    """The model, and its artifacts gate.gguf and predictor.gguf, whose predictors let all through."""
    checkpoint, folder = drawn(request.param), tmp_path_factory.mktemp("structure")
    write_artifact(checkpoint, folder / "gate.gguf")
    write_artifact(checkpoint, folder / "predictor.gguf", predictor=True, slack=1e6)
    return checkpoint, folder


@pytest.mark.parametrize("field", ["parallel", "sub_norms"])
def test_what_does_not_run_beside_experts_is_refused(field: str, tmp_path: Path) -> None:
    checkpoint = DrawnCheckpoint(drawn_config(**STRUCTURES["experts"], **{field: True}), BIASES)
    message = rf"powerinfer\.{field}: expected false beside experts, found [Tt]rue"
    with pytest.raises(PowerinferError, match=message):  # reads what it wrote
        write_artifact(checkpoint, tmp_path / "a.gguf")
    with pytest.raises(PowerinferError, match=message):
        check_artifact(tmp_path / "a.gguf")


def test_the_artifact_says_what_the_checkpoint_is(structure: Structure) -> None:
    checkpoint, folder = structure
    found, expected = open_artifact(folder / "gate.gguf").config, checkpoint.config
    assert (found.rope is None) == (expected.rope is None)
    if found.rope is not None and expected.rope is not None:
        np.testing.assert_array_equal(found.rope.inv_freq, expected.rope.inv_freq)
        assert found.rope.scale == expected.rope.scale
    assert vars(found) | {"rope": None} == vars(expected) | {"rope": None}


def test_dense_equals_reference(structure: Structure) -> None:
    checkpoint, folder = structure
    tokens = ids(40)
    expected = reference_logits(checkpoint, tokens)
    for kernels in KERNELS:
        with Engine(folder / "gate.gguf", mode="dense", kernels=kernels) as engine:
            assert nmse(engine.score(tokens)[0], expected) <= 1e-6
            engine.truncate(0)
            assert nmse(engine.prefill(tokens, logits=True), expected[-1]) <= 1e-6
        found = decode_all(folder / "gate.gguf", tokens, mode="dense", kernels=kernels)
        assert nmse(found, expected) <= 1e-6


def test_same_greedy_tokens_as_reference(structure: Structure) -> None:
    checkpoint, folder = structure
    prompt = ids(8, seed=1)
    found = greedy_tokens(folder / "gate.gguf", prompt, 64)
    expected = reference_logits(checkpoint, prompt + found[:-1])[len(prompt) - 1 :]
    assert found == expected.argmax(-1).tolist()


@pytest.mark.parametrize("kernels", KERNELS)
def test_modes_are_equal_bit_for_bit(structure: Structure, kernels: int) -> None:
    _, folder = structure
    dense = decode_all(folder / "gate.gguf", ids(24), mode="dense", kernels=kernels)
    for artifact, mode in (("gate", "gate"), ("predictor", "auto"), ("predictor", "gate"), ("predictor", "dense")):
        found = decode_all(folder / f"{artifact}.gguf", ids(24), mode=mode, kernels=kernels)
        assert np.array_equal(found, dense), (artifact, mode)


@pytest.mark.parametrize("name", ["parallel", "sub norms", "all"])
def test_a_sparse_prompt_scores_like_decoding(name: str, tmp_path: Path) -> None:
    path = write_artifact(drawn(name), tmp_path / "a.gguf", predictor=True, slack=-0.2).path
    tokens = ids(32)
    with Engine(path) as engine:
        scored, layers = engine.score(tokens)
    assert nmse(decode_all(path, tokens), scored) <= 1e-4  # a logit at the threshold may fall on either side
    assert all(0 < layer.n_hit < layer.n_true for layer in layers), "the slack should cost some recall"


@pytest.mark.parametrize("quant", ["f32", "q4_0"])
@pytest.mark.parametrize("name", ["sub norms", "experts", "all"])
def test_threads_change_nothing(name: str, quant: str, tmp_path: Path) -> None:
    path = write_artifact(drawn(name), tmp_path / "a.gguf", quant=quant, predictor=True, rank=32).path
    runs = [decode_all(path, ids(16), threads=n) for n in (1, 2, 3)]
    scored = []
    for n in (1, 2, 3):
        with Engine(path, threads=n) as engine:
            scored.append(engine.score(ids(150)))
    for run, (logits, layers) in zip(runs, scored, strict=True):
        assert np.array_equal(run, runs[0])
        assert np.array_equal(logits, scored[0][0])
        assert layers == scored[0][1]


@pytest.mark.parametrize("quant", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("name", ["parallel", "qk norm", "sub norms", "softcap", "plain experts", "all"])
def test_quantised_equals_reference_on_the_same_weights(name: str, quant: str, tmp_path: Path) -> None:
    blocks = {"n_layer": 2, "n_embd": 128, "n_ff": 224, "n_head": 4, "head_dim": 32, "rotary": ()}
    checkpoint = Rounded(DrawnCheckpoint(drawn_config(**STRUCTURES[name] | blocks), BIASES), quant)
    write_artifact(checkpoint, tmp_path / "a.gguf", quant=quant)
    tokens = ids(40)
    expected = reference_logits(checkpoint, tokens)
    bound = 1e-6 if quant == "f16" else 3e-4
    with Engine(tmp_path / "a.gguf") as engine:
        assert nmse(engine.score(tokens)[0], expected) <= bound
    assert nmse(decode_all(tmp_path / "a.gguf", tokens), expected) <= bound


@pytest.mark.parametrize("quant", ["f32", "q4_0"])
@pytest.mark.parametrize("name", STRUCTURES)
def test_a_model_on_disk_gives_the_same_bits(name: str, quant: str, tmp_path: Path) -> None:
    checkpoint = drawn(name)
    for how in ({}, {"predictor": True, "slack": 0.02}):
        path = write_artifact(checkpoint, tmp_path / "a.gguf", quant=quant, **how).path
        resident = tuple(i % 3 * 50 for i in range(checkpoint.config.n_layer))
        runs = []
        for limits, threads in ((None, 1), (DiskLimits(resident, 24, 400), 2), (DiskLimits(resident, 24, 400), 3)):
            with Engine(Model(path, limits), ctx_size=64, threads=threads) as engine:
                rows = [engine.prefill(ids(6), logits=True)]
                rows += [engine.decode(token, logits=True) for token in ids(8, seed=1)]
                assert (engine.stats().neurons_disk > 0) == (limits is not None)
                runs.append(np.array(rows))
        assert np.array_equal(runs[1], runs[0])
        assert np.array_equal(runs[2], runs[0])


def test_memory_is_what_placement_counts(structure: Structure) -> None:
    checkpoint, folder = structure
    artifact = open_artifact(folder / "predictor.gguf")
    costs = artifact_costs(
        artifact.config, artifact.plans, quant="f32", biases=checkpoint.biases, ctx_size=100, threads=2
    )
    with Engine(artifact.path, ctx_size=100, threads=2) as engine:
        assert engine.info.weight_bytes == costs.weights
        assert engine.memory() == (costs.kv, costs.scratch)


@pytest.mark.parametrize("name", ["sub norms", "softcap"])
@pytest.mark.parametrize("tensor", ["output_norm.weight", "blk.1.ffn_neurons.weight"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_damaged_weights_are_never_sampled_from(name: str, tensor: str, value: float, tmp_path: Path) -> None:
    """A norm or a cap must not make a finite number of what is none."""
    artifact = write_artifact(drawn(name), tmp_path / "a.gguf")
    with Engine(damage(artifact.path, tmp_path / "b.gguf", tensor, value), mode="dense") as engine:
        engine.decode(1)
        with pytest.raises(PowerinferError, match="a logit is not a finite number"):
            engine.sample(GREEDY)
