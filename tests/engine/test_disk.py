"""The disk tier: whatever stays in the file, every mode gives the same bits as with all of it in memory."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from powerinfer_tools.engine import DiskLimits, Engine, Model
from powerinfer_tools.errors import PowerinferError
from tests.artifacts import make_artifact
from tests.tiny import make_llama, make_opt

QUANTS = ("f32", "f16", "q8_0", "q4_0")
MODES = ("auto", "gate", "dense", "predictor")
COUNTED = (
    "neurons_prefix neurons_cache neurons_disk disk_reads disk_bytes stream_bytes neurons_ahead neurons_ahead_asked"
).split()
PROMPT, TOKENS = [5, 17, 200, 3, 99, 41], [7, 7, 120, 250, 33, 7, 120, 8, 9, 7]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gated and a plain model, with and without predictors, in every type."""
    folder = tmp_path_factory.mktemp("disk")
    make_llama(folder / "llama", n_layer=3, n_embd=96, n_ff=352, n_head=3, n_head_kv=1, head_dim=32)
    make_opt(folder / "opt", n_layer=3, n_embd=96, n_head=3, n_ff=320)
    for quant in QUANTS:
        for name in ("llama", "opt"):
            make_artifact(folder / name, folder / f"{name}-gate-{quant}.gguf", quant=quant)
            make_artifact(
                folder / name, folder / f"{name}-predictor-{quant}.gguf", quant=quant, predictor=True, slack=0.02
            )
    stream = {"quant": "q8_0", "predictor": True, "input": "stream"}
    make_artifact(folder / "llama", folder / "llama-stream-q8_0.gguf", **stream)
    return folder


def run(path: Path, limits: DiskLimits | None, **how: Any) -> tuple[Any, ...]:
    """All that an engine gives: of a prompt, of tokens one by one before and after another prompt, of scoring."""
    with Engine(Model(path, limits), ctx_size=64, **how) as engine:
        first = engine.prefill(PROMPT, logits=True)
        decoded = [engine.decode(token, logits=True) for token in TOKENS]
        second = engine.prefill(PROMPT[::-1], logits=True)
        decoded += [engine.decode(token, logits=True) for token in TOKENS[::-1]]
        engine.truncate(0)
        scored, scores = engine.score(PROMPT + TOKENS)
        stats = engine.stats()
    return first, np.array(decoded), second, scored, scores, stats


def same(found: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    for a, b in zip(found[:4], expected[:4], strict=True):
        np.testing.assert_array_equal(a, b)
    assert found[4] == expected[4]
    assert found[5].neurons_computed == expected[5].neurons_computed
    assert found[5].bytes_decode == expected[5].bytes_decode


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("kind", ["llama-gate", "llama-predictor", "opt-gate", "opt-predictor"])
def test_a_model_on_disk_gives_the_same_bits(models: Path, kind: str, quant: str, mode: str) -> None:
    path = models / f"{kind}-{quant}.gguf"
    expected = run(path, None, mode=mode, threads=1)
    found = []
    for threads, reader in ((1, "io_uring"), (2, "threads"), (3, "best")):
        found.append(run(path, DiskLimits((0, 40, 200), 24, 400, reader), mode=mode, threads=threads))
        same(found[-1], expected)
    for name in COUNTED:  # the cache holds the same whatever the number of threads
        assert len({getattr(stats, name) for *_, stats in found}) == 1
    stats = found[0][-1]
    picks = kind.endswith("gate") if mode == "gate" else mode != "dense"
    assert (stats.neurons_disk > 0, stats.neurons_prefix > 0) == (picks, picks)
    assert stats.stream_bytes > 0


@pytest.mark.parametrize("threads", [1, 3])
def test_predictors_of_the_stream_choose_the_same_on_disk(models: Path, threads: int) -> None:
    path = models / "llama-stream-q8_0.gguf"
    found = run(path, DiskLimits((0, 40, 200), 24, 400), threads=threads)
    same(found, run(path, None, threads=1))
    assert found[-1].neurons_disk > 0


def test_where_more_is_asked_than_there_is_room_for_the_layer_is_read_whole(models: Path) -> None:
    path = models / "llama-predictor-q8_0.gguf"
    found = run(path, DiskLimits((0, 40, 200), 0, 5))
    same(found, run(path, None))
    assert found[-1].neurons_disk < len(TOKENS) * 2 * 3 * 5


def test_neurons_that_stay_are_not_read(models: Path) -> None:
    path = models / "llama-predictor-q4_0.gguf"
    with Engine(Model(path, DiskLimits((352, 352, 352), 0, 0)), ctx_size=64) as engine:
        engine.prefill(PROMPT)
        engine.decode(1)
        stats = engine.stats()
    assert (stats.neurons_disk, stats.stream_bytes) == (0, 0)
    assert stats.disk_reads == len(PROMPT) + 1  # rows of the embedding


def test_a_prompt_leaves_a_full_cache(models: Path) -> None:
    path = models / "llama-predictor-q8_0.gguf"
    with Engine(Model(path, DiskLimits((0, 40, 200), 352, 100)), ctx_size=64) as engine:
        engine.prefill(PROMPT)
        for token in TOKENS:
            engine.decode(token)
        stats = engine.stats()
    assert stats.neurons_disk == 0
    assert stats.neurons_cache > 0


@pytest.mark.parametrize("reader", ["io_uring", "threads"])
def test_the_next_layer_is_asked_while_one_waits(models: Path, reader: str) -> None:
    path = models / "llama-predictor-q4_0.gguf"
    with Engine(Model(path, DiskLimits((352, 0, 0), 0, 352, reader)), ctx_size=64) as engine:
        for token in TOKENS:
            engine.decode(token)
        stats = engine.stats()
    steps = (
        len(TOKENS) - 1
    )  # of one layer, the last: none before it waits for the other, and the first token foresees none
    assert 0 < stats.neurons_ahead <= steps * 64
    assert stats.neurons_ahead / 2 < stats.neurons_ahead_asked <= stats.neurons_ahead
    assert stats.neurons_ahead_asked <= stats.neurons_disk


def test_where_little_is_read_nothing_is_foreseen(models: Path) -> None:
    path = models / "llama-predictor-q4_0.gguf"
    with Engine(Model(path, DiskLimits((300, 300, 300), 0, 352)), ctx_size=64) as engine:
        for token in TOKENS:
            engine.decode(token)
        assert (engine.stats().neurons_ahead, engine.stats().neurons_disk > 0) == (0, True)


def test_engines_of_one_model_share_its_cache(models: Path) -> None:
    path = models / "llama-predictor-f16.gguf"
    model = Model(path, DiskLimits((0, 0, 0), 352, 352))
    first, second = Engine(model, ctx_size=64), Engine(model, ctx_size=64)
    expected = [first.decode(token, logits=True) for token in TOKENS]
    found = [second.decode(token, logits=True) for token in TOKENS]
    np.testing.assert_array_equal(found, expected)
    assert first.stats().neurons_disk > 0
    assert second.stats().neurons_disk == 0


@pytest.mark.parametrize("reader", ["io_uring", "threads"])
@pytest.mark.parametrize("step", ["decode", "prefill", "score"])
@pytest.mark.parametrize("damage", ["cut", "changed", "unreadable"])
def test_a_file_that_fails_is_one_clear_error(
    models: Path, tmp_path: Path, reader: str, step: str, damage: str
) -> None:
    path = Path(shutil.copy(models / "llama-predictor-q8_0.gguf", tmp_path / "a.gguf"))
    engine = Engine(Model(path, DiskLimits((0, 0, 0), 8, 352, reader)), ctx_size=64)
    engine.decode(1)
    if damage == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "changed":
        os.utime(path, ns=(0, 0))
    else:
        _make_unreadable(path, tmp_path)
    steps = {
        "decode": lambda: engine.decode(2),
        "prefill": lambda: engine.prefill([2]),
        "score": lambda: engine.score([2]),
    }
    message = {"cut": "became shorter|was changed", "changed": "was changed", "unreadable": "cannot be read"}[damage]
    for call in (steps[step], *steps.values()):
        with pytest.raises(PowerinferError, match=message) as error:
            call()
        assert error.value.kind in ("io", "truncated")
    engine.close()


def _make_unreadable(path: Path, folder: Path) -> None:
    """Puts a folder, whose reads fail, in the place of the descriptor that reads neurons."""
    for fd in os.listdir("/proc/self/fd"):
        if os.path.realpath(f"/proc/self/fd/{fd}") == str(path.resolve()):
            other = os.open(folder, os.O_RDONLY)
            os.dup2(other, int(fd))
            os.close(other)


@pytest.mark.parametrize("limits", [DiskLimits((0, 0), 1, 1), DiskLimits((0, 0, 353), 1, 1)])
def test_limits_must_fit_the_model(models: Path, limits: DiskLimits) -> None:
    with pytest.raises(PowerinferError, match="expected"):
        Model(models / "llama-gate-f32.gguf", limits)
