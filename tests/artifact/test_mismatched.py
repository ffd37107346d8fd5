"""Whole containers that hold no whole model: both readers refuse them for the same reason, naming key or tensor."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from powerinfer_tools.artifact import Artifact, layout, open_artifact
from powerinfer_tools.artifact.gguf_writer import write_gguf
from powerinfer_tools.artifact.layout import TensorPlan
from powerinfer_tools.checkpoint import Experts
from powerinfer_tools.checkpoint.gguf_file import raw_rows
from powerinfer_tools.engine import Model, native
from powerinfer_tools.errors import PowerinferError
from tests.artifacts import make_artifact, write_artifact
from tests.drawn import DrawnCheckpoint, drawn_config
from tests.tiny import make_llama, make_opt

TYPES = {number: name for name, number in layout.TYPE_ID.items()}
Header = tuple[dict[str, Any], dict[str, TensorPlan]]


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Three layers, of which every one runs in mode gate."""
    folder = tmp_path_factory.mktemp("gate")
    return make_artifact(make_llama(folder / "model", n_layer=3, bias=True), folder / "m.gguf")


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("predictor")
    return make_artifact(make_opt(folder / "model"), folder / "m.gguf", quant="q8_0", predictor=True, rank=32)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    checkpoint = DrawnCheckpoint(drawn_config(experts=Experts(8, 2, "softmax", "ffn_input")))
    return write_artifact(checkpoint, tmp_path_factory.mktemp("moe") / "m.gguf")


def rewritten(
    artifact: Artifact, path: Path, change: Callable[[dict[str, Any], dict[str, TensorPlan]], object]
) -> Path:
    """The artifact with its header changed; tensors that keep their bytes keep their data, others are zeros."""
    metadata = {key: stored(value) for key, value in artifact.metadata.items()}
    plans = {t.name: TensorPlan(t.name, TYPES[t.type], t.shape) for t in artifact.file.tensors.values()}
    change(metadata, plans)
    del metadata[layout.KEY_DATA_SHA256]  # the writer's own
    with path.open("wb") as file:
        write_gguf(file, metadata, list(plans.values()), (data_of(artifact, plan) for plan in plans.values()))
    return path


def stored(value: Any) -> Any:
    """The writer tells types by Python's: lists of numbers are arrays."""
    if isinstance(value, list) and value and not isinstance(value[0], str):
        return np.array(value, np.int32 if isinstance(value[0], int) else np.float32)
    return value


def data_of(artifact: Artifact, plan: TensorPlan) -> Iterator[np.ndarray]:
    old = artifact.file.tensors.get(plan.name)
    same = old is not None and old.n_bytes == plan.n_bytes
    yield raw_rows(artifact.file, plan.name) if same else np.zeros(plan.n_bytes, np.uint8)


def kind_and_message(read: Callable[[Path], object], path: Path) -> tuple[str, str]:
    with pytest.raises(PowerinferError) as caught:
        read(path)
    message = str(caught.value)
    assert message.isprintable()
    assert message.startswith(f"{path}: ")
    return caught.value.kind, message


def assert_refused(path: Path, kind: str, *words: str) -> None:
    for read in (open_artifact, native.check_artifact):
        found, message = kind_and_message(read, path)
        assert found == kind, message
        for word in words:
            assert word in message


def test_rewriting_changes_nothing_else(gate: Artifact, predictor: Artifact, tmp_path: Path) -> None:
    for artifact in (gate, predictor):
        path = rewritten(artifact, tmp_path / "same.gguf", lambda metadata, plans: None)
        assert path.read_bytes() == artifact.path.read_bytes()


def test_every_tensor_is_needed(gate: Artifact, predictor: Artifact, moe: Artifact, tmp_path: Path) -> None:
    for artifact in (gate, predictor, moe):
        for name in artifact.file.tensors:
            if name.endswith(".bias") and ("ffn_" in name or "attn_" in name):
                continue  # a bias may be absent
            path = rewritten(artifact, tmp_path / "m.gguf", lambda metadata, plans, name=name: plans.pop(name))
            assert_refused(path, "mismatch", f"{name}: expected ", "found no such tensor")


def test_every_shape_is_checked(gate: Artifact, predictor: Artifact, moe: Artifact, tmp_path: Path) -> None:
    for artifact in (gate, predictor, moe):
        for name, info in artifact.file.tensors.items():

            def longer(metadata: object, plans: dict[str, TensorPlan], name: str = name) -> None:
                old = plans[name]
                plans[name] = TensorPlan(name, old.type, (*old.shape[:-1], old.shape[-1] + 32))

            found = f"[{', '.join(map(str, (*info.shape[:-1], info.shape[-1] + 32)))}]"
            path = rewritten(artifact, tmp_path / "m.gguf", longer)
            if name == "blk.0.predictor_in.weight" or name == "blk.1.predictor_in.weight":
                assert_refused(path, "mismatch", name.replace("_in", "_out"))  # it is what says the rank
            else:
                assert_refused(path, "mismatch", f"{name}: expected ", f"{list(info.shape)}", "found ", found)


def test_every_type_is_checked(gate: Artifact, tmp_path: Path) -> None:
    for name, info in gate.file.tensors.items():
        if len(info.shape) > 1:
            continue  # a matrix may have any weight type: the engine takes them as they are

        def retyped(metadata: object, plans: dict[str, TensorPlan], name: str = name) -> None:
            plans[name] = TensorPlan(name, "f16", plans[name].shape)

        path = rewritten(gate, tmp_path / "m.gguf", retyped)
        assert_refused(path, "mismatch", f"{name}: expected {TYPES[info.type].upper()} ", "found F16 ")


def one_tensor_more(metadata: dict[str, Any], plans: dict[str, TensorPlan]) -> None:
    plans["blk.3.attn_norm.weight"] = TensorPlan("blk.3.attn_norm.weight", "f32", (64,))


def test_a_tensor_too_many(gate: Artifact, tmp_path: Path) -> None:
    assert_refused(
        rewritten(gate, tmp_path / "m.gguf", one_tensor_more),
        "mismatch",
        "blk.3.attn_norm.weight: expected no such tensor",
    )


@pytest.mark.parametrize("n_layer", [1, 2, 4, 12])
def test_layers_that_are_not_there(gate: Artifact, tmp_path: Path, n_layer: int) -> None:
    """A header that claims another number of layers, consistently, over the tensors of three."""

    def change(metadata: dict[str, Any], plans: dict[str, TensorPlan]) -> None:
        metadata["llama.block_count"] = n_layer
        for key in (layout.KEY_MODES, layout.KEY_ALWAYS, layout.KEY_THRESHOLDS, layout.KEY_ROTARY):
            metadata[key] = np.resize(metadata[key], n_layer)

    path = rewritten(gate, tmp_path / "m.gguf", change)
    assert_refused(path, "mismatch", f"blk.{min(n_layer, 3)}.attn_norm.weight: expected ", "no such tensor")


REQUIRED = (
    "general.architecture",
    "llama.block_count",
    "llama.embedding_length",
    "llama.feed_forward_length",
    "llama.attention.head_count",
    "llama.attention.head_count_kv",
    "llama.attention.key_length",
    "llama.attention.layer_norm_rms_epsilon",
    "llama.rope.dimension_count",
    "llama.vocab_size",
    "llama.context_length",
    layout.KEY_VERSION,
    layout.KEY_ACTIVATION,
    layout.KEY_GATED,
    layout.KEY_TIED,
    layout.KEY_THRESHOLDS,
    layout.KEY_MODES,
    layout.KEY_ALWAYS,
    layout.KEY_PREDICTOR_RELU,
    layout.KEY_PREDICTOR_INPUT,
    layout.KEY_ROPE_SCALE,
    layout.KEY_NORM,
    layout.KEY_LEARNED_POSITIONS,
    layout.KEY_PARALLEL,
    layout.KEY_QK_NORM,
    layout.KEY_SUB_NORMS,
    layout.KEY_SOFTCAP,
    layout.KEY_ROTARY,
)


@pytest.mark.parametrize("key", REQUIRED)
def test_keys_are_needed(gate: Artifact, tmp_path: Path, key: str) -> None:
    path = rewritten(gate, tmp_path / "m.gguf", lambda metadata, plans: metadata.pop(key))
    assert_refused(path, "mismatch", "" if key == layout.KEY_VERSION else f"{key}: expected ")


@pytest.mark.parametrize("key", REQUIRED)
def test_keys_have_their_types(gate: Artifact, tmp_path: Path, key: str) -> None:
    path = rewritten(gate, tmp_path / "m.gguf", lambda metadata, plans: metadata.update({key: ["a", "list"]}))
    assert_refused(path, "mismatch", f"{key}: expected ")


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


VALUES: list[tuple[str, Any, str]] = [
    ("general.architecture", "", "malformed"),
    ("general.architecture", "Llama 2\n", "malformed"),
    ("general.architecture", "l" * 65, "malformed"),
    (layout.KEY_VERSION, 3, "unsupported"),
    (layout.KEY_VERSION, 1, "unsupported"),
    (layout.KEY_VERSION, 0, "malformed"),
    (layout.KEY_ACTIVATION, "gelu", "unsupported"),
    (layout.KEY_GATED, 1, "mismatch"),
    ("llama.block_count", 0, "malformed"),
    ("llama.block_count", 4097, "malformed"),
    ("llama.embedding_length", 0, "malformed"),
    ("llama.feed_forward_length", 2**31, "malformed"),
    ("llama.vocab_size", 2**32 - 1, "malformed"),
    ("llama.attention.head_count", 0, "malformed"),
    ("llama.attention.head_count_kv", 3, "malformed"),
    ("llama.attention.layer_norm_rms_epsilon", float("nan"), "malformed"),
    ("llama.attention.layer_norm_rms_epsilon", 0.0, "malformed"),
    ("llama.rope.dimension_count", 15, "malformed"),
    ("llama.rope.dimension_count", 18, "malformed"),
    (layout.KEY_ROPE_SCALE, float("inf"), "malformed"),
    (layout.KEY_ROPE_SCALE, -1.0, "malformed"),
    (layout.KEY_MODES, ints(1, 1, 3), "malformed"),
    (layout.KEY_MODES, ints(1, 0, 1), "malformed"),
    (layout.KEY_MODES, ints(1, 1), "mismatch"),
    (layout.KEY_ALWAYS, ints(0, 160, 0), "malformed"),
    (layout.KEY_ALWAYS, ints(0, -1, 0), "malformed"),
    (layout.KEY_ALWAYS, ints(0, 0, 0, 0), "mismatch"),
    (layout.KEY_THRESHOLDS, floats(0, np.nan, 0), "malformed"),
    (layout.KEY_THRESHOLDS, floats(0, -1, 0), "malformed"),
    (layout.KEY_THRESHOLDS, floats(0, np.inf, 0), "malformed"),
    (layout.KEY_THRESHOLDS, floats(0, 0), "mismatch"),
    (layout.KEY_PREDICTOR_INPUT, "attention", "unsupported"),
    (layout.KEY_NORM, "group", "unsupported"),
    (layout.KEY_LEARNED_POSITIONS, 0, "mismatch"),
    (layout.KEY_PARALLEL, 1, "mismatch"),
    (layout.KEY_QK_NORM, "true", "mismatch"),
    (layout.KEY_SUB_NORMS, 0.0, "mismatch"),
    (layout.KEY_SOFTCAP, -1.0, "malformed"),
    (layout.KEY_SOFTCAP, float("nan"), "malformed"),
    (layout.KEY_SOFTCAP, float("inf"), "malformed"),
    (layout.KEY_SOFTCAP, 15, "mismatch"),
    (layout.KEY_ROTARY, ints(1, 2, 1), "malformed"),
    (layout.KEY_ROTARY, ints(1, -1, 1), "malformed"),
    (layout.KEY_ROTARY, ints(1, 1), "mismatch"),
]


@pytest.mark.parametrize(("key", "value", "kind"), VALUES)
def test_values_are_checked(gate: Artifact, tmp_path: Path, key: str, value: Any, kind: str) -> None:
    path = rewritten(gate, tmp_path / "m.gguf", lambda metadata, plans: metadata.update({key: value}))
    assert_refused(path, kind, key if key != layout.KEY_VERSION else str(value))


EXPERT_KEYS = (layout.KEY_EXPERTS_USED, layout.KEY_GATING, layout.KEY_ROUTED_BY)


@pytest.mark.parametrize("key", EXPERT_KEYS)
def test_experts_need_all_their_keys(moe: Artifact, tmp_path: Path, key: str) -> None:
    path = rewritten(moe, tmp_path / "m.gguf", lambda metadata, plans: metadata.pop(key))
    assert_refused(path, "mismatch", f"{key}: expected ")


def test_no_experts_but_their_tensors(moe: Artifact, tmp_path: Path) -> None:
    path = rewritten(moe, tmp_path / "m.gguf", lambda metadata, plans: metadata.pop(layout.KEY_EXPERTS))
    assert_refused(path, "mismatch", "expected no such tensor")


EXPERT_VALUES: list[tuple[str, Any, str]] = [
    (layout.KEY_EXPERTS, 0, "malformed"),
    (layout.KEY_EXPERTS, 513, "malformed"),
    (layout.KEY_EXPERTS, 7, "malformed"),  # does not divide n_ff
    (layout.KEY_EXPERTS, "8", "mismatch"),
    (layout.KEY_EXPERTS_USED, 0, "malformed"),
    (layout.KEY_EXPERTS_USED, 9, "malformed"),
    (layout.KEY_GATING, "topk", "unsupported"),
    (layout.KEY_ROUTED_BY, "hash", "unsupported"),
    (layout.KEY_SUB_NORMS, True, "unsupported"),
]


@pytest.mark.parametrize(("key", "value", "kind"), EXPERT_VALUES)
def test_values_of_experts_are_checked(moe: Artifact, tmp_path: Path, key: str, value: Any, kind: str) -> None:
    path = rewritten(moe, tmp_path / "m.gguf", lambda metadata, plans: metadata.update({key: value}))
    assert_refused(path, kind, key)


@pytest.mark.parametrize("expert", [8, -1, 2**31 - 1, 0])
def test_every_neuron_has_the_expert_that_its_order_says(moe: Artifact, tmp_path: Path, expert: int) -> None:
    path, info = tmp_path / "m.gguf", moe.file.tensors["blk.1.ffn_expert.weight"]
    at = int(np.flatnonzero(moe.order(1) >= 20)[0])  # not of expert 0
    content = bytearray(moe.path.read_bytes())
    content[info.offset + 4 * at : info.offset + 4 * at + 4] = np.int32(expert).tobytes()
    path.write_bytes(content)
    for read in (open_artifact, Model):
        kind, message = kind_and_message(read, path)
        assert kind == "malformed"
        assert "blk.1.ffn_expert.weight" in message


def test_an_older_artifact_is_to_be_built_again(gate: Artifact, tmp_path: Path) -> None:
    path = rewritten(gate, tmp_path / "m.gguf", lambda metadata, plans: metadata.update({layout.KEY_VERSION: 1}))
    assert_refused(path, "unsupported", "build it again")


@pytest.mark.parametrize("change", [{layout.KEY_NORM: "layer"}, {layout.KEY_LEARNED_POSITIONS: True}])
def test_structure_demands_its_tensors(gate: Artifact, tmp_path: Path, change: dict[str, Any]) -> None:
    eps = {"llama.attention.layer_norm_epsilon": 1e-5}
    path = rewritten(gate, tmp_path / "m.gguf", lambda metadata, plans: metadata.update(change | eps))
    assert_refused(path, "mismatch", "found no such tensor")


def test_no_layer_rotates_by_a_rope_that_nobody_names(predictor: Artifact, tmp_path: Path) -> None:
    path = rewritten(
        predictor, tmp_path / "m.gguf", lambda metadata, plans: metadata.update({layout.KEY_ROTARY: ints(0, 0)})
    )
    assert_refused(path, "mismatch", "expected ", "found no such key")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_frequencies_of_rotation_are_finite(gate: Artifact, tmp_path: Path, value: float) -> None:
    path, info = tmp_path / "m.gguf", gate.file.tensors["rope_inv_freq.weight"]
    content = bytearray(gate.path.read_bytes())
    content[info.offset : info.offset + 4] = np.float32(value).tobytes()
    path.write_bytes(content)
    for read in (open_artifact, Model):
        kind, message = kind_and_message(read, path)
        assert kind == "malformed"
        assert "rope_inv_freq.weight: expected finite numbers" in message


ORDERS: dict[str, Callable[[np.ndarray], object]] = {
    "n_ff": lambda order: order.__setitem__(3, 160),
    "far outside": lambda order: order.__setitem__(159, 2**31 - 1),
    "negative": lambda order: order.__setitem__(0, -1),
    "repeated": lambda order: order.__setitem__(1, order[0]),
}


@pytest.mark.parametrize("case", ORDERS)
def test_neuron_order_is_a_permutation(gate: Artifact, tmp_path: Path, case: str) -> None:
    """Data, so the engine sees it where it loads them."""
    path, order, info = tmp_path / "m.gguf", gate.order(2), gate.file.tensors["blk.2.ffn_order.weight"]
    ORDERS[case](order)
    content = bytearray(gate.path.read_bytes())
    content[info.offset : info.offset + info.n_bytes] = order.tobytes()
    path.write_bytes(content)
    for read in (open_artifact, Model):
        kind, message = kind_and_message(read, path)
        assert kind == "malformed"
        assert "blk.2.ffn_order.weight" in message
