"""Processor and device together, the host device in a card's place: whatever lies where, every bit is the same."""

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
REFUSED = [name for name, fields in STRUCTURES.items() if "experts" in fields or "sub_norms" in fields]
DIVIDED = [name for name in STRUCTURES if name not in REFUSED]
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


def place(path: Path, name: str, seed: int = 0, **how: Any) -> CardLimits:
    """What of the artifact lies on the device."""
    artifact = open_artifact(path)
    n_layer, n_ff = artifact.config.n_layer, artifact.config.n_ff
    bounds = [sorted(set(chunk_bounds(artifact.frequency(i)))) for i in range(n_layer)]
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
