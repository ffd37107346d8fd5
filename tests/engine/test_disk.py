"""The disk tier: whatever stays in the file, every mode gives the same bits as with all of it in memory."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from powerinfer_tools.engine import DiskLimits, Engine, Model
from tests.artifacts import make_artifact
from tests.tiny import make_llama, make_opt

QUANTS = ("f32", "f16", "q8_0", "q4_0")
MODES = ("auto", "gate", "dense", "predictor")
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
    return folder


def run(path: Path, limits: DiskLimits | None, **how: Any) -> tuple[Any, ...]:
    """Everything that an engine gives: of a prompt, of tokens one by one before and after another prompt, of scoring."""
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
    for threads, reader in ((1, "io_uring"), (2, "threads"), (3, "best")):
        same(run(path, DiskLimits((0, 40, 200), 24, 400, reader), mode=mode, threads=threads), expected)
