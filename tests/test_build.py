"""build(): all stages in one call, resumed and skipped by what the files say of themselves."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from powerinfer_tools import build as library
from powerinfer_tools.artifact import Artifact, verify
from powerinfer_tools.artifact.layout import MODE_GATE
from powerinfer_tools.build import Stage, build, default_quant, n_parameters
from powerinfer_tools.checkpoint import Merged, open_checkpoint
from powerinfer_tools.checkpoint.gguf_file import raw_rows
from powerinfer_tools.checkpoint.patch import write_patch
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.placement import Machine, Tier
from powerinfer_tools.progress import silent
from tests.tiny import CORPUS, make_llama, make_opt

MACHINE = Machine("test", 2, Tier(8 << 30, 2e10, ((1 << 10, 1e10), (1 << 16, 2e10))))


@dataclass
class Bench:
    """A folder with a model and a text, and what the last build reported."""

    folder: Path
    model: Path
    text: Path
    stages: list[Stage] = field(default_factory=list)

    @property
    def output(self) -> Path:
        return self.folder / "m.gguf"

    def build(self, **options: Any) -> Artifact:
        self.stages.clear()
        given = {"n_tokens": 512, "machine": MACHINE, "progress": silent, "report": self.stages.append} | options
        return build(self.model, [self.text], self.output, **given)

    def fresh(self) -> list[str]:
        """The stages that the last build ran."""
        return [stage.name for stage in self.stages if not stage.up_to_date]

    def files(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()} - {"model", "text.txt"}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    text = tmp_path / "text.txt"
    text.write_text(CORPUS * 20)
    return Bench(tmp_path, make_llama(tmp_path / "model", n_embd=32, n_ff=64), text)


def test_one_call_leaves_the_artifact_alone(bench: Bench) -> None:
    artifact = bench.build()
    verify(artifact.path)
    assert bench.fresh() == ["profile", "train", "place", "split"]
    assert bench.files() == {"m.gguf"}
    assert set(artifact.provenance["inputs"]) == {"checkpoint", "activations", "predictors", "placement"}
    assert artifact.placement is not None


def test_a_second_build_does_nothing(bench: Bench) -> None:
    first = bench.build().path.stat().st_mtime_ns
    assert bench.build().path.stat().st_mtime_ns == first
    assert bench.fresh() == []


def test_kept_files_serve_the_next_build(bench: Bench) -> None:
    bench.build(keep=True)
    assert bench.files() == {"m.gguf", "m.activations", "m.predictors", "m.placement"}
    bench.build(keep=True, force=True)
    assert bench.fresh() == ["split"]
    bench.build(keep=True, force=True, recall=0.9)
    assert bench.fresh() == ["train", "place", "split"]
    bench.build(keep=True, force=True, recall=0.9, n_tokens=256)
    assert bench.fresh() == ["profile", "train", "place", "split"]


def test_an_artifact_of_another_recipe_is_not_replaced_unasked(bench: Bench) -> None:
    before = bench.build().path.read_bytes()
    with pytest.raises(PowerinferError, match=r"m.gguf exists, built with another quant, recall: use --force"):
        bench.build(quant="f16", recall=0.5)
    bench.text.write_text(CORPUS * 21)
    with pytest.raises(PowerinferError, match=r"another corpus"):
        bench.build()
    make_llama(bench.model, n_embd=32, n_ff=64, seed=1)
    with pytest.raises(PowerinferError, match=r"another checkpoint, corpus"):
        bench.build()
    assert bench.output.read_bytes() == before


def test_a_person_s_stage_file_is_not_replaced_unasked(bench: Bench) -> None:
    bench.build(keep=True)
    bench.output.unlink()
    with pytest.raises(PowerinferError, match=r"m.activations exists, made with another seed: use --force"):
        bench.build(keep=True, seed=3)


def test_a_failed_build_goes_on_where_it_stopped(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*given: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(library, "split", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bench.build()
    assert not bench.output.exists()
    bench.build()
    assert bench.fresh() == ["split"]
    assert bench.files() == {"m.gguf"}


def test_silu_without_a_threshold_runs_in_gate_mode(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(CORPUS * 20)
    bench = Bench(tmp_path, make_llama(tmp_path / "model", n_embd=32, n_ff=64, activation="silu"), text)
    artifact = bench.build()
    assert bench.fresh() == ["profile", "place", "split"]
    assert set(artifact.modes) == {MODE_GATE}
    cut = bench.build(sparsity=0.5, force=True)
    assert bench.fresh() == ["profile", "train", "place", "split"]
    assert cut.config.exactly_sparse


def test_a_patch_on_its_base_is_a_model(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(CORPUS * 20)
    bench = Bench(tmp_path, make_llama(tmp_path / "model", n_embd=32, n_ff=64, activation="silu"), text)
    base, rng = open_checkpoint(bench.model), np.random.default_rng(3)
    factors = {"a": rng.standard_normal((64, 2)), "b": rng.standard_normal((2, 32))}
    learnt = {f"blk.1.ffn_up.weight.{part}": factor.astype(np.float16) for part, factor in factors.items()}
    for name, threshold in (("p", 0.1), ("other", 0.2)):
        write_patch(tmp_path / name, Merged(base, "silu", (threshold,) * 2, learnt))
    artifact = bench.build(patch=tmp_path / "p", quant="f32")
    merged = open_checkpoint(bench.model, patch=tmp_path / "p")
    inputs = artifact.provenance["inputs"]
    assert inputs["checkpoint"] == merged.digest()
    assert {key: inputs[key] for key in ("base", "patch")} == merged.inputs
    np.testing.assert_allclose(artifact.config.thresholds, 0.1)
    stored = raw_rows(artifact.file, "blk.1.ffn_neurons.weight").view(np.float32).reshape(64, -1, 32)
    up = merged.read("blk.1.ffn_up.weight")[artifact.order(1)]
    np.testing.assert_array_equal(stored[:, -2], up)
    bench.build(patch=tmp_path / "p", quant="f32")
    assert bench.fresh() == []
    for another in (tmp_path / "other", None):
        with pytest.raises(PowerinferError, match="built with another checkpoint: use --force"):
            bench.build(patch=another, quant="f32")


def test_opt_builds_from_end_to_end(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(CORPUS * 20)
    bench = Bench(tmp_path, make_opt(tmp_path / "model", n_embd=32, n_ff=64), text)
    verify(bench.build(quant="q4_0").path)


def test_a_missing_text_is_named_before_any_work(bench: Bench) -> None:
    bench.text.unlink()
    with pytest.raises(PowerinferError, match=r"text.txt: no such file"):
        bench.build()
    assert bench.files() == set()


def test_the_ram_budget_reaches_the_artifact(bench: Bench) -> None:
    with pytest.raises(PowerinferError, match=r"--ram: expected at least \d+ bytes"):
        bench.build(ram=1000)
    assert not bench.output.exists()


def test_auto_chooses_by_size(bench: Bench) -> None:
    config = open_checkpoint(bench.model).config
    embeddings, attention, ffn = 2 * 300 * 32, 2 * (32 * 32 + 32 * 16), 3 * 32 * 64
    assert n_parameters(config) == embeddings + 2 * (attention + ffn)
    assert default_quant(config) == "q8_0"
    assert bench.build().quant == "q8_0"


def test_auto_keeps_large_models_small(tmp_path: Path) -> None:
    config = open_checkpoint(make_llama(tmp_path / "model")).config
    assert default_quant(replace(config, n_embd=4096, n_ff=11008, n_layer=32)) == "q4_0"
