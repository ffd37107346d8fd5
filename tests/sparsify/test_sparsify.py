"""Whole runs on a small model: the share is reached, the student learns, a killed run ends in the same bits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from powerinfer_tools.checkpoint import merge, open_checkpoint
from powerinfer_tools.describe import describe
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.sparsify import Step
from powerinfer_tools.sparsify.recipe import check
from tests.drawn import DrawnCheckpoint, drawn_config
from tests.sparsify.conftest import SHORT, Bench
from tests.tiny import make_llama, make_opt


def test_cut(bench: Bench) -> None:
    before = bench.checkpoint.digest()
    result = bench.sparsify()
    assert bench.checkpoint.digest() == before
    assert all(abs(share - 0.3) < 0.03 for share in result.student.active)
    assert [round(step.wanted, 3) for step in (bench.steps[0], bench.steps[-1])] == [0.55, 0.3]
    config = open_checkpoint(result.output).config
    assert config.activation == "silu"
    assert len(config.thresholds) == 2
    assert all(t > 0 for t in config.thresholds)
    assert sorted(p.name for p in bench.folder.iterdir()) == ["out"]
    report = json.loads((result.output / "sparsify.json").read_text())
    assert report["active"] == 0.3
    assert report["student"]["perplexity"]["all"] == result.student.perplexity["all"]
    assert result.teacher.active == [1.0, 1.0]


@pytest.mark.parametrize("rank", [None, 4])
def test_training_brings_the_student_nearer(bench: Bench, rank: int | None) -> None:
    """Against the same cut without training."""
    bench.sparsify("idle", rank=rank, rate=1e-9)
    idle = bench.steps[-1]
    bench.sparsify("trained", rank=rank, rate=0.01)
    trained = bench.steps[-1]
    assert abs(trained.active - idle.active) < 0.02
    assert trained.divergence < 0.9 * idle.divergence
    assert trained.loss < 0.9 * idle.loss


@pytest.mark.parametrize("to", ["relu", "fatrelu", "drelu"])
def test_other_activations(bench: Bench, to: str) -> None:
    wanted = 0.2 if to == "drelu" else 0.3
    result = bench.sparsify(to=to, active=wanted)
    config = open_checkpoint(result.output).config
    assert config.activation == to
    share = sum(result.student.active) / 2
    if to == "relu":  # pressed, not cut
        assert config.thresholds == (0.0, 0.0)
        natural = bench.sparsify("natural", to=to, active=1.0).student.active
        assert share < sum(natural) / 2 - 0.03
    else:
        assert abs(share - wanted) < 0.03


@pytest.mark.parametrize("rank", [None, 4])
def test_a_killed_run_ends_in_the_same_bits(bench: Bench, rank: int | None) -> None:
    whole = bench.sparsify("whole", rank=rank)
    whole_steps = [(step.loss, step.active) for step in bench.steps]
    seen: list[tuple[float, float]] = []

    def kill(step: Step) -> None:
        if step.done == 5 * 256 + 256 * (len(seen) > 5):
            raise KeyboardInterrupt
        seen.append((step.loss, step.active))

    for save_s in (0.0, 1e9):  # the second is killed before it has saved anything more
        with pytest.raises(KeyboardInterrupt):
            bench.sparsify("killed", rank=rank, report=kill, save_s=save_s)
        seen += [(0.0, 0.0)] * (6 - len(seen))
    resumed = bench.sparsify("killed", rank=rank)
    assert [(step.loss, step.active) for step in bench.steps] == whole_steps[5:]
    for file in ("model.safetensors", "config.json"):
        assert (resumed.output / file).read_bytes() == (whole.output / file).read_bytes()
    assert not list(bench.folder.glob(".*"))


def test_another_recipe_does_not_go_on(bench: Bench) -> None:
    def kill(step: Step) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.sparsify(report=kill)
    with pytest.raises(PowerinferError, match="an unfinished run with another active, seed"):
        bench.sparsify(active=0.4, seed=1)
    bench.sparsify(active=0.4, seed=1, force=True)
    with pytest.raises(PowerinferError, match="out exists: use --force"):
        bench.sparsify()


def test_a_patch_is_what_was_trained(bench: Bench) -> None:
    result = bench.sparsify(rank=4)
    assert result.patch is not None
    assert result.patch.stat().st_size < (result.output / "model.safetensors").stat().st_size / 2
    written, merged = open_checkpoint(result.output), merge(bench.checkpoint, result.patch)
    assert merged.config.thresholds == written.config.thresholds
    for name in written.names():
        np.testing.assert_array_equal(merged.read(name), written.read(name))
    up, old = merged.read("blk.1.ffn_up.weight"), bench.checkpoint.read("blk.1.ffn_up.weight")
    assert np.linalg.matrix_rank(up - old, tol=1e-4) == 4
    np.testing.assert_array_equal(merged.read("blk.1.ffn_up.weight", slice(3, 9)), up[3:9])
    with pytest.raises(PowerinferError, match="made from another checkpoint"):
        merge(written, result.patch)
    shown = describe(result.patch, check=True)
    assert (shown["kind"], shown["rank"], shown["activation"], shown["verified"]) == ("patch", 4, "silu", True)
    assert shown["inputs"] == {"checkpoint": bench.checkpoint.digest()}


def test_a_run_that_diverges_says_so(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from powerinfer_tools.sparsify import training

    monkeypatch.setattr(training, "learning_rate", lambda peak, done: float("inf"))
    with pytest.raises(PowerinferError, match="training diverged at step 2: try a lower --lr"):
        bench.sparsify()


def test_what_cannot_be_sparsified(bench: Bench, tmp_path: Path) -> None:
    bench.model = make_opt(tmp_path / "opt")
    with pytest.raises(PowerinferError, match="its activation, relu, gives exact zeros already"):
        bench.sparsify()
    bench.model = make_llama(tmp_path / "relu")
    with pytest.raises(PowerinferError, match="its activation, relu, gives exact zeros already"):
        bench.sparsify()


@pytest.mark.parametrize(
    "structure", [{"gated": False}, {"learned_positions": True}, {"sub_norms": True}, {"softcap": 9.0}]
)
def test_a_structure_that_no_student_has_is_refused(structure: dict[str, Any]) -> None:
    with pytest.raises(PowerinferError, match="drawn: expected a gated FFN without experts, no learned positions"):
        check(SHORT, DrawnCheckpoint(drawn_config(**structure, activation="silu")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"to": "gelu"}, "--to: expected one of cut, relu, fatrelu, drelu, found gelu"),
        ({"to": "relu", "rank": 4}, "--rank goes with --to cut"),
        ({"active": 0.0}, "--active: expected a number above 0, at most 1, found 0.0"),
        ({"rate": -1.0}, "--lr: expected a number above 0"),
        ({"window": 1000}, "--window: expected 2 to 128"),
        ({"precision": "int8"}, "--precision: expected one of auto, float32, bfloat16, found int8"),
    ],
)
def test_arguments_that_are_refused(bench: Bench, changes: dict[str, object], message: str) -> None:
    with pytest.raises(PowerinferError, match=message):
        bench.sparsify(**changes)
    assert not list(bench.folder.iterdir())
