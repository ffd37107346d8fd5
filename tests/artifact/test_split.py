"""What split writes: the checkpoint's numbers in stored order, quantised as ggml does it, whole or not at all."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize, quantize

from powerinfer_tools.artifact import Artifact, split, verify, weights
from powerinfer_tools.artifact.layout import (
    ALIGNMENT,
    MODE_GATE,
    MODE_PREDICTOR,
    QUANTS,
    TYPE_ID,
    LayerPlan,
    matrix_type,
    tensor_table,
)
from powerinfer_tools.checkpoint import Checkpoint, open_checkpoint
from powerinfer_tools.checkpoint.gguf_file import raw_rows
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.placement import Placement
from powerinfer_tools.progress import silent
from powerinfer_tools.reference import load_ffn
from tests.artifacts import DrawnActivations, DrawnPredictors
from tests.tiny import make_llama, make_opt

GATE, PREDICTOR = LayerPlan(MODE_GATE), LayerPlan(MODE_PREDICTOR, rank=32, always=5)


@pytest.fixture(scope="module", params=["llama", "opt"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp(request.param)
    made = make_opt(folder) if request.param == "opt" else make_llama(folder, bias=True)
    return open_checkpoint(made)


@pytest.fixture
def small(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(make_llama(tmp_path / "model", n_embd=32, n_ff=64))


def activations_of(checkpoint: Checkpoint, **other: Any) -> Any:
    config = checkpoint.config
    return DrawnActivations(checkpoint.digest(), config.n_layer, config.n_ff, config.thresholds, **other)


def make(checkpoint: Checkpoint, output: Path, plans: list[LayerPlan] | None = None, **options: Any) -> Artifact:
    """The artifact with drawn activations, and predictors where a plan asks for one."""
    predictors: Any = DrawnPredictors(checkpoint, plans, 0.5, options.get("quant", "q4_0")) if plans else None
    activations = activations_of(checkpoint)
    return split(checkpoint, activations, output, predictors=predictors, progress=silent, **options)


def tensor(artifact: Artifact, name: str) -> np.ndarray:
    """The tensor as float32, in numpy's order of dimensions."""
    info = artifact.file.tensors[name]
    rows = dequantize(np.array(raw_rows(artifact.file, name)), GGMLQuantizationType(info.type))
    return rows.reshape(info.shape[::-1])


def raw(artifact: Artifact, name: str) -> bytes:
    return np.array(raw_rows(artifact.file, name)).tobytes()


def stored(checkpoint: Checkpoint, layer: int, part: str) -> np.ndarray:
    """One row a neuron, in stored order."""
    matrix = checkpoint.read(f"blk.{layer}.{part}.weight")
    return (matrix.T if part == "ffn_down" else matrix)[activations_of(checkpoint).order(layer)]


def quantised(rows: np.ndarray, quant: str) -> bytes:
    kind = TYPE_ID[matrix_type(quant, rows.shape[-1])]
    return quantize(np.ascontiguousarray(rows), GGMLQuantizationType(kind)).tobytes()


@pytest.mark.parametrize("quant", QUANTS)
def test_tensors_are_the_checkpoint_quantised_by_gguf(checkpoint: Checkpoint, quant: str, tmp_path: Path) -> None:
    artifact = make(checkpoint, tmp_path / "m.gguf", [PREDICTOR, GATE], quant=quant)
    parts = ["ffn_gate", "ffn_up", "ffn_down"] if checkpoint.config.gated else ["ffn_up", "ffn_down"]
    for layer, bundled in ((0, parts), (1, parts[1:])):
        bundles = np.stack([stored(checkpoint, layer, part) for part in bundled], axis=1)
        assert raw(artifact, f"blk.{layer}.ffn_neurons.weight") == quantised(bundles, quant)
    assert raw(artifact, "blk.1.ffn_select.weight") == quantised(stored(checkpoint, 1, parts[0]), quant)
    for name in ("token_embd.weight", "blk.1.attn_k.weight", "blk.0.attn_output.weight"):
        assert raw(artifact, name) == quantised(checkpoint.read(name), quant)
    for name in checkpoint.biases - {f"blk.{i}.{p}.bias" for i in (0, 1) for p in ("ffn_gate", "ffn_up")}:
        assert raw(artifact, name) == checkpoint.read(name).tobytes()
    verify(artifact.path)


@pytest.mark.parametrize("quant", QUANTS)
def test_predictors_are_stored_for_the_neurons_that_are_asked(
    checkpoint: Checkpoint, quant: str, tmp_path: Path
) -> None:
    artifact = make(checkpoint, tmp_path / "m.gguf", [GATE, PREDICTOR], quant=quant)
    w_in, w_out, bias = DrawnPredictors(checkpoint, [GATE, PREDICTOR], 0.5, "q4_0").weights(1)
    asked = activations_of(checkpoint).order(1)[PREDICTOR.always :]
    assert raw(artifact, "blk.1.predictor_in.weight") == quantised(w_in, quant)
    assert raw(artifact, "blk.1.predictor_out.weight") == quantised(w_out[asked], quant)
    assert raw(artifact, "blk.1.predictor_out.bias") == bias[asked].tobytes()
    assert artifact.plans == [GATE, PREDICTOR]


@pytest.mark.parametrize("plan", [GATE, PREDICTOR])
def test_reordered_neurons_compute_what_the_checkpoint_does(
    checkpoint: Checkpoint, plan: LayerPlan, tmp_path: Path
) -> None:
    import torch

    artifact, config = make(checkpoint, tmp_path / "m.gguf", [plan, plan], quant="f32"), checkpoint.config
    x = np.random.default_rng(1).standard_normal((7, config.n_embd)).astype(np.float32)
    for layer in range(config.n_layer):
        bundles = tensor(artifact, f"blk.{layer}.ffn_neurons.weight")
        rows = list(bundles.transpose(1, 0, 2))
        if plan.mode == MODE_GATE:
            rows.insert(0, tensor(artifact, f"blk.{layer}.ffn_select.weight"))
        h = np.maximum(x @ rows[0].T + bias_of(artifact, layer, "ffn_gate" if config.gated else "ffn_up"), 0)
        if config.gated:
            h *= x @ rows[1].T + bias_of(artifact, layer, "ffn_up")
        y = h @ rows[-1] + bias_of(artifact, layer, "ffn_down")
        expected = load_ffn(checkpoint, layer)(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())


def bias_of(artifact: Artifact, layer: int, part: str) -> np.ndarray:
    return tensor(artifact, f"blk.{layer}.{part}.bias")[..., :]


def test_every_layer_keeps_its_own_pattern(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "model", n_layer=12, n_embd=32, n_ff=64)
    checkpoint = open_checkpoint(folder)
    artifact, activations = make(checkpoint, tmp_path / "m.gguf", quant="f16"), activations_of(checkpoint)
    assert len({artifact.order(i).tobytes() for i in range(12)}) == 12
    for i in range(12):
        np.testing.assert_array_equal(artifact.order(i), activations.order(i))
        frequency = activations.frequency(i)[activations.order(i)]
        np.testing.assert_allclose(artifact.frequency(i), frequency, rtol=1e-6)
        assert (np.diff(artifact.frequency(i)) <= 0).all()


@pytest.mark.parametrize("quant", QUANTS)
def test_sizes_are_those_of_the_table(checkpoint: Checkpoint, quant: str, tmp_path: Path) -> None:
    artifact = make(checkpoint, tmp_path / "m.gguf", [GATE, PREDICTOR], quant=quant)
    table = tensor_table(checkpoint.config, [GATE, PREDICTOR], quant, checkpoint.biases)
    assert list(artifact.file.tensors) == [plan.name for plan in table]
    assert artifact.tensor_bytes == sum(plan.n_bytes for plan in table)
    padded = sum(plan.n_bytes + -plan.n_bytes % ALIGNMENT for plan in table[:-1])
    assert artifact.n_bytes == artifact.path.stat().st_size
    assert artifact.n_bytes == artifact.file.data_offset + padded + table[-1].n_bytes


def test_the_gguf_package_lists_it(checkpoint: Checkpoint, tmp_path: Path) -> None:
    artifact = make(checkpoint, tmp_path / "m.gguf", [PREDICTOR, GATE], quant="q4_0")
    reader = GGUFReader(artifact.path)
    listed = {t.name: (int(t.tensor_type), tuple(int(n) for n in t.shape), int(t.n_bytes)) for t in reader.tensors}
    assert listed == {t.name: (t.type, t.shape, t.n_bytes) for t in artifact.file.tensors.values()}
    config, value = checkpoint.config, lambda key: reader.fields[key].contents()
    assert value("general.architecture") == config.arch
    assert value("general.file_type") == 2
    assert value(f"{config.arch}.feed_forward_length") == config.n_ff
    assert value("tokenizer.huggingface.json") == checkpoint.tokenizer_json
    tokens = value("tokenizer.ggml.tokens")
    assert len(tokens) == config.n_vocab
    assert tokens[:2] == ["<s>", "</s>"]
    assert tokens[value("tokenizer.ggml.eos_token_id")] == "</s>"
    assert value("tokenizer.ggml.token_type")[:5] == [3, 3, 3, 3, 1]


def test_same_inputs_give_the_same_bytes_and_no_path(small: Checkpoint, tmp_path: Path) -> None:
    first = make(small, tmp_path / "a.gguf").path.read_bytes()
    second = make(open_checkpoint(small.path), tmp_path / "b.gguf").path.read_bytes()
    assert first == second
    assert str(tmp_path).encode() not in first


def test_blocks_do_not_change_the_bytes(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make(checkpoint, tmp_path / "a.gguf", [PREDICTOR, GATE]).path.read_bytes()
    monkeypatch.setattr(weights, "BLOCK_ELEMENTS", 7 * checkpoint.config.n_embd)
    assert make(checkpoint, tmp_path / "b.gguf", [PREDICTOR, GATE]).path.read_bytes() == whole


def test_provenance_names_all_inputs(small: Checkpoint, tmp_path: Path) -> None:
    artifact = make(small, tmp_path / "m.gguf", [PREDICTOR, GATE], arguments={"recall": 0.9})
    expected = {"checkpoint": small.digest(), "activations": "a" * 64, "predictors": "b" * 64}
    assert artifact.provenance["inputs"] == expected
    assert artifact.provenance["arguments"] == {"quant": "q4_0", "recall": 0.9}


@pytest.mark.parametrize(
    ("name", "index", "bad", "quant", "message"),
    [
        ("blk.1.ffn_up.weight", (40, 3), np.nan, "q4_0", r"blk.1.ffn_up.weight \[40, 3\]: .*finite number, found nan"),
        ("blk.0.ffn_down.weight", (3, 40), -np.inf, "f32", r"ffn_down.weight \[3, 40\]: .*finite number, found -inf"),
        ("output_norm.weight", (5,), np.inf, "f16", r"output_norm.weight \[5\]: expected a finite number, found inf"),
        ("token_embd.weight", (299, 1), 70000, "q8_0", r"token_embd.weight \[299, 1\]: .*±65504 for q8_0, found 70000"),
    ],
)
def test_a_number_that_cannot_be_stored_is_named(
    small: Checkpoint,
    name: str,
    index: tuple[int, ...],
    bad: float,
    quant: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = small.read

    def spoilt(wanted: str, rows: slice | None = None) -> np.ndarray:
        numbers = read(wanted).copy()
        if wanted == name:
            numbers[index] = bad
        return numbers if rows is None else numbers[rows]

    monkeypatch.setattr(small, "read", spoilt)
    monkeypatch.setattr(weights, "BLOCK_ELEMENTS", 20 * small.config.n_embd)
    with pytest.raises(PowerinferError, match=message):
        make(small, tmp_path / "m.gguf", quant=quant)
    assert not list(tmp_path.glob("*m.gguf*"))


def test_a_large_weight_is_kept_in_f32(small: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = small.read
    monkeypatch.setattr(small, "read", lambda name, rows=None: read(name, rows) * np.float32(1e6))
    assert np.abs(tensor(make(small, tmp_path / "m.gguf", quant="f32"), "token_embd.weight")).max() > 65504


def test_inputs_that_do_not_belong_together_are_refused(small: Checkpoint, tmp_path: Path) -> None:
    output, activations = tmp_path / "m.gguf", activations_of(small)
    stranger = replace(activations, checkpoint_digest="c" * 64)
    with pytest.raises(
        PowerinferError, match=rf"another checkpoint: expected {small.digest()[:12]}, found cccc.*profile"
    ):
        split(small, stranger, output)
    predictors: Any = DrawnPredictors(small, [GATE] * 2, 0.0, "q4_0", activations_digest="d" * 64)
    with pytest.raises(PowerinferError, match=r"another activations file: expected aaaa.*found dddd.*powerinfer train"):
        split(small, activations, output, predictors=predictors)
    other = DrawnPredictors(small, [GATE] * 2, 0.0, "q8_0")
    with pytest.raises(PowerinferError, match=r"trained for --quant q8_0, found q4_0; train them anew"):
        split(small, activations, output, predictors=other)  # type: ignore[arg-type]
    assert not output.exists()


@pytest.mark.parametrize(
    ("inputs", "quant", "message"),
    [
        ({"activations": "e" * 64}, "q4_0", r"placement: made for other activations: expected aaaa.*found eeee.*place"),
        ({}, "q4_0", r"placement: made for other activations: expected aaaa.*found none"),
        ({"activations": "a" * 64, "predictors": "e" * 64}, "q4_0", r"other predictors: expected bbbb.*found eeee"),
        ({"activations": "a" * 64}, "f16", r"other quant: expected q4_0, found f16"),
    ],
)
def test_a_placement_of_something_else_is_refused(
    inputs: dict[str, str], quant: str, message: str, small: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(PowerinferError, match=message):
        make(small, tmp_path / "m.gguf", [GATE, GATE], placement=placement_of(inputs, quant))


def test_the_placement_is_in_the_keys(small: Checkpoint, tmp_path: Path) -> None:
    placement = placement_of({"activations": "a" * 64}, "q4_0")
    assert make(small, tmp_path / "m.gguf", placement=placement).placement == ([3, 0], [64, 10])


def placement_of(inputs: dict[str, str], quant: str) -> Placement:
    return Placement(
        vram=[3, 0],
        ram=[64, 10],
        dense=[False, False],
        head=False,
        n_ff=64,
        objective="time",
        quant=quant,
        ctx_size=256,
        expected_ms=1.0,
        impact=1.0,
        bound=1.0,
        gap=0.0,
        budgets={"vram": 0, "ram": None},
        n_bytes={},
        hits={},
        inputs=inputs,
    )


def test_a_model_that_is_never_exactly_sparse_runs_in_gate_mode(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_llama(tmp_path / "model", activation="silu"))
    artifact = make(checkpoint, tmp_path / "m.gguf")
    assert not artifact.config.exactly_sparse
    assert artifact.modes == [MODE_GATE, MODE_GATE]


def test_an_existing_output_needs_force(small: Checkpoint, tmp_path: Path) -> None:
    output = tmp_path / "m.gguf"
    output.write_bytes(b"precious")
    with pytest.raises(PowerinferError, match="--force"):
        make(small, output)
    assert output.read_bytes() == b"precious"
    make(small, output, force=True)
    verify(output)


def test_a_link_keeps_pointing(small: Checkpoint, tmp_path: Path) -> None:
    target, link = tmp_path / "real.gguf", tmp_path / "link.gguf"
    target.write_bytes(b"old")
    link.symlink_to(target)
    make(small, link, force=True)
    assert link.is_symlink()
    verify(target)


def test_a_full_disk_is_seen_before_the_work(
    small: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 10, 10))
    with pytest.raises(PowerinferError, match=r"m.gguf: needs \d+ bytes, found 10 free"):
        make(small, tmp_path / "m.gguf")


SPLIT = """
import resource, signal, sys
from pathlib import Path
from tests.artifacts import make_artifact
limit = int(sys.argv[3])
if limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
print("ready", flush=True)
make_artifact(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def start_split(checkpoint: Checkpoint, output: Path, limit: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SPLIT, str(checkpoint.path), str(output), str(limit)]
    root = Path(__file__).parents[2]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, **pipes)  # type: ignore[call-overload, no-any-return]


def test_a_file_that_grows_too_large_leaves_nothing(small: Checkpoint, tmp_path: Path) -> None:
    output = tmp_path / "out" / "m.gguf"
    output.parent.mkdir()
    process = start_split(small, output, limit=20000)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "m.gguf: cannot be written: File too large" in errors
    assert not list(output.parent.iterdir())


@pytest.mark.slow
def test_a_killed_split_leaves_the_old_file(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_llama(tmp_path / "model", n_layer=8, n_embd=256, n_ff=1024))
    output = tmp_path / "out" / "m.gguf"
    output.parent.mkdir()
    old = make(checkpoint, output, quant="q8_0").path.read_bytes()
    process = start_split(checkpoint, output)
    assert process.stdout is not None
    process.stdout.readline()
    started = time.monotonic()
    process.communicate(timeout=60)
    needed, new = time.monotonic() - started, output.read_bytes()
    for share in np.linspace(0.05, 0.95, 10):
        output.write_bytes(old)
        process = start_split(checkpoint, output)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(share * needed)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert output.read_bytes() in (old, new)
    make(checkpoint, output, force=True)
    assert [path.name for path in output.parent.iterdir()] == ["m.gguf"]
