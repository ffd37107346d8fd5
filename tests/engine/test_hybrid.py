"""Processor and device together, the host device in a card's place: whatever lies where, every bit is the same."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from powerinfer_tools.artifact import open_artifact
from powerinfer_tools.engine import CardLimits, DiskLimits, Engine, Model
from powerinfer_tools.engine.native import chunk_bounds
from powerinfer_tools.errors import PowerinferError
from tests.artifacts import make_artifact, write_artifact
from tests.drawn import STRUCTURES, DrawnCheckpoint, drawn_config
from tests.engine.test_engine import KERNELS, ids
from tests.tiny import make_llama, make_opt

QUANTS = ("f32", "f16", "q8_0", "q4_0")
MODES = ("auto", "gate", "dense", "predictor")
PLACEMENTS = ("nothing", "all", "head", "blocks", "neurons", "most neurons", "mixed")
REFUSED = [name for name, fields in STRUCTURES.items() if "sub_norms" in fields]
DIVIDED = [name for name in STRUCTURES if name not in REFUSED]
EXPERTS = [name for name in DIVIDED if "experts" in STRUCTURES[name]]
BIASES = ("attn_q", "attn_output", "ffn_up", "ffn_down")
SUMS = "neurons_computed neurons_active neurons_total n_decode n_prefill".split()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gated and a plain model, with and without predictors, in every type; all layers have several chunks."""
    folder = tmp_path_factory.mktemp("hybrid")
    make_llama(folder / "llama", n_layer=4, n_embd=96, n_ff=352, n_head=3, n_head_kv=1, head_dim=32, bias=True)
    make_opt(folder / "opt", n_layer=4, n_embd=96, n_head=3, n_ff=333)
    for quant in QUANTS:
        for name in ("llama", "opt"):
            make_artifact(folder / name, folder / f"{name}-gate-{quant}.gguf", quant=quant)
            how = {"quant": quant, "predictor": True, "always": 40, "slack": 0.02}
            make_artifact(folder / name, folder / f"{name}-predictor-{quant}.gguf", **how)
            make_artifact(folder / name, folder / f"{name}-stream-{quant}.gguf", input="stream", **how)
    return folder


@pytest.fixture(scope="module")
def long_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    sizes = {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_ctx": 800}
    make_llama(folder / "llama", **sizes, n_ff=192, n_head_kv=1, head_dim=32)
    make_opt(folder / "opt", **sizes, n_ff=160)
    make_artifact(folder / "llama", folder / "llama-predictor-q8_0.gguf", quant="q8_0", predictor=True, slack=0.02)
    make_artifact(folder / "opt", folder / "opt-gate-f16.gguf", quant="f16")
    return folder


def place(path: Path, name: str, seed: int = 0, **how: Any) -> CardLimits:
    """What of the artifact lies on the device; of experts no neurons."""
    artifact = open_artifact(path)
    n_layer, n_ff = artifact.config.n_layer, artifact.config.n_ff
    bounds = [sorted(set(chunk_bounds(artifact.frequency(i)))) for i in range(n_layer)]
    if artifact.config.experts is not None:
        n_ff, bounds = 0, [[0, 0]] * n_layer
    rng = np.random.default_rng(seed)
    none, whole = (0,) * n_layer, (n_ff,) * n_layer
    no, yes = (False,) * n_layer, (True,) * n_layer
    drawn = tuple(int(rng.choice(b)) for b in bounds)
    dense, neurons, head = {
        "nothing": (no, none, False),
        "all": (yes, whole, True),
        "head": (no, none, True),
        "blocks": (yes, none, False),
        "neurons": (no, tuple(b[1] for b in bounds), False),
        "most neurons": (yes, tuple(b[-2] for b in bounds), True),
        "mixed": (tuple(bool(x) for x in rng.integers(0, 2, n_layer)), drawn, bool(rng.integers(0, 2))),
    }[name]
    return CardLimits(dense, neurons, head, device="host", **how)


def run(model: Model, **how: Any) -> tuple[Any, ...]:
    """All that an engine gives: of prompts, of tokens one by one before and after them, of a context that was cut, of
    scoring."""
    with Engine(model, ctx_size=160, **how) as engine:
        first = engine.prefill(ids(9), logits=True)
        decoded = [engine.decode(token, logits=True) for token in ids(5, seed=1)]
        second = engine.prefill(ids(33, seed=2), logits=True)
        decoded += [engine.decode(token, logits=True) for token in ids(4, seed=3)]
        engine.truncate(20)
        decoded += [engine.decode(token, logits=True) for token in ids(3, seed=4)]
        stats = engine.stats()
        engine.truncate(7)
        scored, scores = engine.score(ids(40, seed=5))
    return first, np.array(decoded), second, scored, scores, stats


def same(found: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    for a, b in zip(found[:4], expected[:4], strict=True):
        np.testing.assert_array_equal(a, b)
    assert found[4] == expected[4]
    for name in SUMS:
        assert getattr(found[5], name) == getattr(expected[5], name), name
    assert found[5].bytes_decode + found[5].card_read_bytes == expected[5].bytes_decode


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("kind", [f"{m}-{k}" for m in ("llama", "opt") for k in ("gate", "predictor", "stream")])
def test_any_placement_gives_the_same_bits(models: Path, kind: str, quant: str) -> None:
    path = models / f"{kind}-{quant}.gguf"
    for mode in MODES:
        expected = run(Model(path), mode=mode, threads=1)
        for seed, name in enumerate(PLACEMENTS):
            threads = (1, 2, 4)[seed % 3]
            same(run(Model(path, None, place(path, name, seed)), mode=mode, threads=threads), expected)
            lending = place(path, name, seed, lend_from=(9, 10)[seed % 2])
            same(run(Model(path, None, lending), mode=mode, threads=1), expected)


@pytest.mark.slow
@pytest.mark.parametrize("kernels", KERNELS)
def test_random_placements_of_random_structures_give_the_same_bits(divided: Path, kernels: int) -> None:
    """divided: an artifact a structure and way of choosing neurons."""
    for seed, path in enumerate(sorted(divided.glob("*.gguf"))):
        for mode in ("auto", "dense"):
            expected = run(Model(path), mode=mode, threads=1, kernels=kernels)
            for k in range(3):
                how = place(path, "mixed", 100 * kernels + 10 * seed + k, lend_from=(0, 20, 33)[k])
                same(run(Model(path, None, how), mode=mode, threads=1 + k, kernels=kernels), expected)


@pytest.fixture(scope="module")
def divided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("divided")
    for name in DIVIDED:
        checkpoint = DrawnCheckpoint(drawn_config(**STRUCTURES[name]), BIASES)
        label, quant = name.replace(" ", "-"), ("f32", "q4_0")[len(name) % 2]
        write_artifact(checkpoint, folder / f"{label}-gate.gguf", quant=quant)
        write_artifact(checkpoint, folder / f"{label}-predictor.gguf", quant=quant, predictor=True, slack=-0.1)
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_divided_is_refused_by_name(name: str, tmp_path: Path) -> None:
    path = write_artifact(DrawnCheckpoint(drawn_config(**STRUCTURES[name])), tmp_path / "a.gguf").path
    with pytest.raises(PowerinferError, match="sub_norms") as error:
        Model(path, None, place(path, "nothing"))
    assert error.value.kind == "unsupported"


def test_neurons_of_experts_are_refused_there(tmp_path: Path) -> None:
    path = write_artifact(DrawnCheckpoint(drawn_config(**STRUCTURES["experts"])), tmp_path / "a.gguf").path
    n_layer = open_artifact(path).config.n_layer
    neurons = (0,) * (n_layer - 1) + (32,)
    with pytest.raises(PowerinferError, match=f"no neurons of experts.* found 32 of layer {n_layer - 1}$") as error:
        Model(path, None, CardLimits((True,) * n_layer, neurons, device="host"))
    assert error.value.kind == "unsupported"


@pytest.mark.parametrize("kind", ["llama-predictor-q8_0", "opt-gate-f16"])
@pytest.mark.parametrize("n", [1, 2, 255, 256, 257, 600])
def test_prompts_around_a_batch_and_what_is_lent(long_models: Path, kind: str, n: int) -> None:
    path = long_models / f"{kind}.gguf"
    tokens = ids(n, seed=n)

    def both(model: Model) -> tuple[Any, ...]:
        with Engine(model, ctx_size=700, threads=2) as engine:
            prompt, decoded = engine.prefill(tokens, logits=True), engine.decode(5, logits=True)
            engine.truncate(3 % n)
            return prompt, decoded, *engine.score(tokens)

    expected = both(Model(path))
    for lend_from in (0, 1, 88, 89, 256, 257):
        for name in ("all", "neurons", "most neurons", "mixed"):
            found = both(Model(path, None, place(path, name, seed=n, lend_from=lend_from)))
            for a, b in zip(found[:3], expected[:3], strict=True):
                np.testing.assert_array_equal(a, b)
            assert found[3] == expected[3]


def test_sessions_of_one_model_do_not_meet(models: Path) -> None:
    path = models / "llama-predictor-f16.gguf"
    model = Model(path, None, place(path, "mixed", 3))
    expected = run(Model(path))
    engines = [Engine(model, ctx_size=64, threads=n) for n in (1, 2)]
    rows: list[list[Any]] = [[], []]
    for token in ids(6):
        for engine, found in zip(engines, rows, strict=True):
            found.append(engine.decode(token, logits=True))
    np.testing.assert_array_equal(rows[0], rows[1])
    same(run(model), expected)


def test_what_crosses_is_counted(models: Path) -> None:
    path = models / "llama-gate-f16.gguf"
    n_embd, n_vocab = 96, 300

    def of_one_token(name: str) -> tuple[int, int, int]:
        with Engine(Model(path, None, place(path, name)), ctx_size=64) as engine:
            engine.prefill(ids(5))
            engine.decode(1)
            stats = engine.stats()
            engine.reset_stats()
            assert engine.stats().card_read_bytes == engine.stats().card_neurons == 0
        assert (stats.seconds_card > 0) == (stats.card_waits > 0)
        return stats.card_transfers, stats.card_waits, stats.card_bytes

    assert of_one_token("nothing") == (0, 0, 0)
    assert of_one_token("all") == (2, 1, 4 * (n_embd + n_vocab))  # the embedding there, the logits back
    assert of_one_token("head") == (2, 1, 4 * (n_embd + n_vocab))
    assert of_one_token("neurons") == (4 * 2, 4, 4 * 4 * 2 * n_embd)  # of each layer: the FFN's input and a sum
    # the stream there once; of each layer the FFN's input and a sum back, and their sum there
    assert of_one_token("most neurons") == (1 + 4 * 3 + 1, 4 * 2 + 1, 4 * ((1 + 4 * 3) * n_embd + n_vocab))


def test_neurons_are_counted_where_they_were_computed(models: Path) -> None:
    path = models / "llama-predictor-q8_0.gguf"
    stats = {}
    for name in ("nothing", "neurons", "most neurons", "all"):
        stats[name] = run(Model(path, None, place(path, name)))[-1]
    shares = [stats[name].card_neurons_fired for name in stats]
    assert shares == sorted(set(shares))
    assert shares[0] == 0
    assert shares[-1] == stats["all"].neurons_active
    assert stats["all"].card_neurons == stats["all"].neurons_computed
    assert stats["all"].bytes_decode == 0


def test_sessions_count_in_the_budget(models: Path) -> None:
    path = models / "llama-gate-q4_0.gguf"
    model = Model(path, None, place(path, "most neurons"))
    with Engine(model, ctx_size=64) as engine:
        one = sum(engine.card_memory())
        assert engine.card_memory()[0] == 4 * 2 * 64 * 32 * 2
    budget = model.info.card_bytes + 2 * one
    model = Model(path, None, place(path, "most neurons", budget=budget))
    first = Engine(model, ctx_size=64)
    for _ in range(3):
        Engine(model, ctx_size=64).close()
    second = Engine(model, ctx_size=64)
    with pytest.raises(PowerinferError, match=rf"at most {budget} bytes, found .* {3 * one} of sessions"):
        Engine(model, ctx_size=64)
    np.testing.assert_array_equal(first.decode(1, logits=True), second.decode(1, logits=True))


@pytest.mark.parametrize("kind", ["llama-gate", "llama-predictor", "llama-stream", "opt-gate", "opt-predictor"])
def test_three_tiers_give_the_same_bits(models: Path, kind: str) -> None:
    path = models / f"{kind}-q8_0.gguf"
    for mode in ("auto", "dense"):
        expected = run(Model(path), mode=mode, threads=1)
        for seed, name in enumerate(PLACEMENTS):
            card = place(path, name, seed, lend_from=(0, 20)[seed % 2])
            resident = tuple(max(k, min(k + more, 333)) for k, more in zip(card.neurons, (0, 40, 7, 200), strict=True))
            limits = (DiskLimits(resident, 24, 400), DiskLimits(resident, 0, 5, "threads"))[seed % 2]
            found = run(Model(path, limits, card), mode=mode, threads=1 + seed % 3)
            same(found, expected)
            assert found[5].stream_bytes > 0 or min(resident) >= 250


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_on_disk_beside_a_card_give_the_same_bits(name: str, tmp_path: Path) -> None:
    checkpoint = DrawnCheckpoint(drawn_config(**STRUCTURES[name]), BIASES)
    path = write_artifact(checkpoint, tmp_path / "a.gguf", quant="q8_0", predictor=True, slack=-0.1).path
    config = open_artifact(path).config
    limits = DiskLimits((0, config.n_ff // 2) * (config.n_layer // 2), 16, config.n_ff)
    expected = run(Model(path), threads=1)
    for seed, placement in enumerate(("blocks", "all", "mixed")):
        same(run(Model(path, limits, place(path, placement, seed)), threads=1 + seed), expected)


def test_what_is_on_the_card_takes_no_memory_beside_a_disk(tmp_path: Path) -> None:
    n_layer, row = 2, 128 * 4
    make_llama(tmp_path / "llama", n_layer=n_layer, n_embd=128, n_ff=1024, n_head=2, n_head_kv=1, head_dim=64)
    path = make_artifact(tmp_path / "llama", tmp_path / "a.gguf").path
    limits = DiskLimits((900, 1024), 24, 400)
    divided = place(path, "neurons").neurons
    without = Model(path, limits).info
    info = Model(path, limits, CardLimits((False,) * n_layer, divided, device="host")).info
    moved = sum(divided) * 3 * row  # the gate's rows lie apart, in whole pages of their own
    assert info.card_bytes == 2 << 20  # there in whole pages, which are large
    assert 0 <= info.resident_bytes + moved - without.resident_bytes <= 4096 * 2 * 2 * n_layer
    with pytest.raises(PowerinferError, match=r"n_resident: expected \d+ to 1024, found 0"):
        Model(path, DiskLimits((900, 0), 24, 400), CardLimits((False,) * n_layer, divided, device="host"))


@pytest.mark.parametrize("name", ["blocks", "neurons", "most neurons"])
def test_a_disk_that_fails_beside_a_card_is_one_clear_error(models: Path, tmp_path: Path, name: str) -> None:
    path = Path(shutil.copy(models / "llama-predictor-q8_0.gguf", tmp_path / "a.gguf"))
    card = place(path, name, lend_from=2)
    with Engine(Model(path, DiskLimits(card.neurons, 8, 352), card), ctx_size=64) as engine:
        engine.decode(1)
        os.truncate(path, path.stat().st_size // 2)
        steps = [lambda: engine.decode(2), lambda: engine.prefill([2, 3]), lambda: engine.score([2])] * 2
        for step in steps:
            with pytest.raises(PowerinferError, match=r"became shorter|was changed"):
                step()
        assert engine.position == 1
