"""What open_artifact and verify promise: the artifact is what its own keys say, or one line says what is not."""

import importlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from powerinfer_tools.artifact import Artifact, layout, open_artifact, verify
from powerinfer_tools.artifact.layout import TensorPlan
from powerinfer_tools.checkpoint import open_checkpoint
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.tokens import Tokenizer
from tests.artifacts import make_artifact
from tests.tiny import make_llama, make_opt

# by name: in the package, `split` is the function
split_module = importlib.import_module("powerinfer_tools.artifact.split")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_llama(tmp_path / "model", n_embd=32, n_ff=64, bias=True)


@pytest.fixture
def artifact(model: Path, tmp_path: Path) -> Artifact:
    return make_artifact(model, tmp_path / "m.gguf", quant="q8_0", predictor=True, rank=32)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_config_comes_back(family: str, tmp_path: Path) -> None:
    folder = make_opt(tmp_path / "model") if family == "opt" else make_llama(tmp_path / "model", activation="fatrelu")
    artifact, checkpoint = make_artifact(folder, tmp_path / "m.gguf"), open_checkpoint(folder)
    found, expected = vars(artifact.config).copy(), vars(checkpoint.config).copy()
    ropes = found.pop("rope"), expected.pop("rope")
    np.testing.assert_allclose(found.pop("thresholds"), expected.pop("thresholds"), rtol=1e-7)
    assert found == expected
    if family == "llama":
        np.testing.assert_array_equal(ropes[0].inv_freq, ropes[1].inv_freq)
        assert ropes[0].scale == ropes[1].scale
    assert artifact.tokenizer_json == checkpoint.tokenizer_json
    assert artifact.chat_template == checkpoint.chat_template
    assert artifact.special == checkpoint.special


def test_verify_sees_one_flipped_bit_anywhere(artifact: Artifact) -> None:
    verify(artifact.path)
    whole = artifact.path.read_bytes()
    start = artifact.file.data_offset
    drawn = np.random.default_rng(0).integers(start, len(whole), 20).tolist()
    for at in [start, len(whole) - 1, *drawn]:
        spoilt = bytearray(whole)
        spoilt[at] ^= 1
        artifact.path.write_bytes(spoilt)
        with pytest.raises(PowerinferError, match=r"m.gguf: "):
            verify(artifact.path)


def test_reading_imports_neither_torch_nor_gguf(artifact: Artifact) -> None:
    program = (
        "import sys; from pathlib import Path; from powerinfer_tools.artifact import open_artifact\n"
        "open_artifact(Path(sys.argv[1])); sys.exit(bool({'torch', 'gguf', 'safetensors'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", program, str(artifact.path)]
    subprocess.run(command, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, check=True)


def table_with(change: Callable[[list[TensorPlan]], list[TensorPlan]]) -> Callable[..., list[TensorPlan]]:
    return lambda *arguments: change(layout.tensor_table(*arguments))


def retyped(table: list[TensorPlan]) -> list[TensorPlan]:
    return [
        TensorPlan(plan.name, "f16", plan.shape) if plan.name == "blk.1.ffn_neurons.weight" else plan for plan in table
    ]


MISSING = ("blk.1.attn_q.weight", "blk.0.ffn_norm.weight", "blk.1.ffn_up.bias", "blk.0.predictor_in.weight")


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_tensor_is_named(name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without = table_with(lambda table: [plan for plan in table if plan.name != name])
    monkeypatch.setattr(split_module, "tensor_table", without)
    with pytest.raises(PowerinferError, match=rf"m.gguf: {name}: expected Q?.*\[.*\], found no such tensor"):
        make_artifact(model, tmp_path / "m.gguf", quant="q8_0", predictor=True, rank=32)


def test_a_tensor_too_many_is_named(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = table_with(lambda table: [*table, TensorPlan("blk.1.ffn_down.weight", "f32", (64, 32))])
    monkeypatch.setattr(split_module, "tensor_table", more)
    with pytest.raises(PowerinferError, match=r"blk\.1\.ffn_down\.weight: expected no such tensor"):
        make_artifact(model, tmp_path / "m.gguf")


def test_a_wrong_type_is_named(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_module, "tensor_table", table_with(retyped))
    message = r"blk.1.ffn_neurons.weight: expected Q8_0 \[32, 2, 64\], found F16 \[32, 2, 64\]"
    with pytest.raises(PowerinferError, match=message):
        make_artifact(model, tmp_path / "m.gguf", quant="q8_0")


def test_a_wrong_shape_is_named(artifact: Artifact) -> None:
    name = b"blk.1.ffn_neurons.weight"
    replace_bytes(artifact.path, name + struct.pack("<I3Q", 3, 32, 3, 64), name + struct.pack("<I3Q", 3, 64, 3, 32))
    with pytest.raises(PowerinferError, match=r"expected Q8_0 \[32, 3, 64\], found Q8_0 \[64, 3, 32\]"):
        open_artifact(artifact.path)


def replace_bytes(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert data.count(old) == 1
    assert len(old) == len(new)
    path.write_bytes(data.replace(old, new))


ORDERS = [
    (lambda order: order.__setitem__(3, 64), r"\[3\]: expected a neuron in 0 .. 63, found 64"),
    (lambda order: order.__setitem__(0, -1), r"\[0\]: expected a neuron in 0 .. 63, found -1"),
    (lambda order: order.__setitem__(1, order[0]), r"expected each neuron once, found \d+ more often"),
]


@pytest.mark.parametrize(("spoil", "message"), ORDERS)
def test_the_order_is_a_permutation(spoil: Callable[[Any], None], message: str, artifact: Artifact) -> None:
    info = artifact.file.tensors["blk.1.ffn_order.weight"]
    order = artifact.order(1)
    spoil(order)
    data = bytearray(artifact.path.read_bytes())
    data[info.offset : info.offset + info.n_bytes] = order.tobytes()
    artifact.path.write_bytes(data)
    with pytest.raises(PowerinferError, match=rf"m.gguf: blk.1.ffn_order.weight.*{message}"):
        open_artifact(artifact.path)


def test_the_frequency_is_a_falling_share(artifact: Artifact) -> None:
    info = artifact.file.tensors["blk.0.ffn_frequency.weight"]
    data = bytearray(artifact.path.read_bytes())
    data[info.offset : info.offset + info.n_bytes] = artifact.frequency(0)[::-1].tobytes()
    artifact.path.write_bytes(data)
    with pytest.raises(PowerinferError, match=r"blk.0.ffn_frequency.weight: expected shares that fall"):
        open_artifact(artifact.path)


KEYS: list[tuple[str, Any, str]] = [
    (layout.KEY_VERSION, 3, r"m.gguf: format 3 is newer than this program reads \(2\)"),
    (layout.KEY_VERSION, 1, r"m.gguf: format 1 is older than this program reads \(2\): build it again"),
    (
        layout.KEY_ALWAYS,
        np.array([3, 64], np.int32),
        r"powerinfer.always\[1\]: expected an integer in 0 .. 63, found 64",
    ),
    (layout.KEY_ALWAYS, np.array([3], np.int32), "powerinfer.always: expected 2 numbers, one a layer"),
    (layout.KEY_MODES, np.array([2, 3], np.int32), r"powerinfer.ffn_mode\[1\]: expected an integer in 1 .. 2, found 3"),
    (layout.KEY_MODES, np.array([2, 1], np.int32), r"blk.1.ffn_select.weight: expected Q8_0 \[32, 64\], found no"),
    (layout.KEY_THRESHOLDS, np.array([0, np.nan], np.float32), r"threshold\[1\]: expected a finite number, 0 or above"),
    (layout.KEY_THRESHOLDS, np.array([0, -1], np.float32), r"threshold\[1\]: expected a finite number, 0 or above"),
    (layout.KEY_ACTIVATION, "gelu", "powerinfer.activation: expected one of relu,.*found 'gelu'"),
    (layout.KEY_GATED, 1, "powerinfer.gated: expected a bool, found 1"),
    (layout.KEY_SPECIAL, '{"bos":0,"eos":[300]}', "powerinfer.special: expected token ids in 0 .. 299, found 300"),
    (layout.KEY_SPECIAL, '{"bos":-1,"eos":[]}', "powerinfer.special: expected token ids in 0 .. 299, found -1"),
    (layout.KEY_SPECIAL, "[" * 4000, r"powerinfer.special: expected a JSON object, found '\[\["),
    (layout.KEY_PROVENANCE, "no", "powerinfer.provenance: expected a JSON object, found 'no'"),
    (layout.KEY_PLACEMENT_RAM, np.array([9, 9], np.int32), "placement.vram: expected a list, found no such key"),
    ("llama.block_count", 3, "powerinfer.rotary: expected 3 numbers, one a layer, found '2 numbers'"),
    ("llama.attention.head_count_kv", 3, "head_count_kv: expected a divisor of 4, found 3"),
    ("llama.attention.layer_norm_rms_epsilon", 0.0, "layer_norm_rms_epsilon: expected a number above 0, found 0.0"),
    ("general.architecture", "Llama 2", "general.architecture: expected a short name in lower case, found 'Llama 2'"),
    (layout.KEY_NORM, "group", "powerinfer.norm: expected one of rms, layer, found 'group'"),
    (layout.KEY_ROTARY, np.array([1, 2], np.int32), r"powerinfer.rotary\[1\]: expected an integer in 0 .. 1, found 2"),
]


@pytest.mark.parametrize(("key", "value", "message"), KEYS)
def test_a_key_that_is_wrong_is_named(
    key: str, value: Any, message: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = split_module.artifact_metadata
    monkeypatch.setattr(split_module, "artifact_metadata", lambda *given: metadata(*given) | {key: value})
    with pytest.raises(PowerinferError, match=message):
        make_artifact(model, tmp_path / "m.gguf", quant="q8_0", predictor=True, rank=32)


def test_a_token_of_10_mb_is_refused_by_what_reads_text(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The artifact keeps the tokenizer verbatim and does not look into it."""
    metadata = split_module.artifact_metadata
    description = json.loads((model / "tokenizer.json").read_text())
    description["added_tokens"][0]["content"] = "a" * (10 << 20)
    changed = {layout.KEY_TOKENIZER: json.dumps(description)}
    monkeypatch.setattr(split_module, "artifact_metadata", lambda *given: metadata(*given) | changed)
    artifact = make_artifact(model, tmp_path / "m.gguf")
    with pytest.raises(PowerinferError, match="expected tokens of at most 4096 characters, found one of 10485760"):
        Tokenizer(artifact.tokenizer_json, artifact.special)


@pytest.mark.parametrize("key", [layout.KEY_QUANT, layout.KEY_TOKENIZER, layout.KEY_TIED, "llama.vocab_size"])
def test_a_missing_key_is_named(key: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = split_module.artifact_metadata

    def without(*given: Any) -> dict[str, Any]:
        return {name: value for name, value in metadata(*given).items() if name != key}

    monkeypatch.setattr(split_module, "artifact_metadata", without)
    with pytest.raises(PowerinferError, match=f"{key}: expected a .*, found no such key"):
        make_artifact(model, tmp_path / "m.gguf")


def test_another_program_s_file_is_no_artifact(artifact: Artifact) -> None:
    replace_bytes(artifact.path, layout.KEY_VERSION.encode(), layout.KEY_VERSION.upper().encode())
    with pytest.raises(PowerinferError, match="expected an artifact of powerinfer, found a GGUF file of another"):
        open_artifact(artifact.path)
