"""An artifact's header, checked against everything that its own keys promise. Imports neither torch nor gguf."""

import json
import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from powerinfer_tools.artifact import layout
from powerinfer_tools.artifact.layout import MODE_GATE, MODE_PREDICTOR, LayerPlan, TensorPlan, tensor_table
from powerinfer_tools.checkpoint.config import (
    ACTIVATIONS,
    GATINGS,
    MAX_EXPERTS,
    NORMS,
    ROUTER_INPUTS,
    Config,
    Experts,
    Rope,
)
from powerinfer_tools.checkpoint.gguf_file import GgufFile, read_gguf
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.files import sha256_file

T = TypeVar("T")
MAX_SIZE, MAX_LAYERS, MAX_HEAD, MAX_CTX = 1 << 24, 4096, 65536, 1 << 26  # as in native/src/model.cpp
ARCH_PATTERN = "[a-z0-9_.-]{1,64}"  # likewise
_TYPE_NAME = {number: name.upper() for name, number in layout.TYPE_ID.items()}


@dataclass(frozen=True)
class Artifact:
    """What an artifact is; nothing is held but its header.

    plans: one a layer; placement: (k1, k2) a layer as the build placed it, or None; provenance: digests of the
    inputs, tool version, arguments; data_sha256: of all tensor data.
    """

    path: Path
    config: Config
    quant: str
    plans: list[LayerPlan]
    predictor_relu: bool
    predictor_input: str
    placement: tuple[list[int], list[int]] | None
    tokenizer_json: str
    chat_template: str | None
    special: dict[str, Any]
    provenance: dict[str, Any]
    data_sha256: str
    file: GgufFile

    @property
    def metadata(self) -> dict[str, Any]:
        """All keys of the file."""
        return self.file.metadata

    @property
    def n_bytes(self) -> int:
        """The file's size."""
        return self.file.n_bytes

    @property
    def head(self) -> str | None:
        """The type of output.weight, where there is one."""
        head = self.file.tensors.get("output.weight")
        return None if head is None else next(name for name, number in layout.TYPE_ID.items() if number == head.type)

    @property
    def modes(self) -> list[int]:
        """layout.MODE_GATE or MODE_PREDICTOR, one a layer."""
        return [plan.mode for plan in self.plans]

    @property
    def always(self) -> list[int]:
        """Neurons computed unasked, one count a layer."""
        return [plan.always for plan in self.plans]

    @property
    def biases(self) -> frozenset[str]:
        """Names of the tensors that are biases."""
        return frozenset(name for name in self.file.tensors if name.endswith(".bias"))

    @cached_property
    def tensor_bytes(self) -> int:
        """All tensors, without the padding between them."""
        return sum(tensor.n_bytes for tensor in self.file.tensors.values())

    def order(self, i: int) -> npt.NDArray[np.int32]:
        """The checkpoint's index of each stored neuron of layer i, [n_ff]."""
        return _vector(self.file, f"blk.{i}.ffn_order.weight", np.int32)

    def frequency(self, i: int) -> npt.NDArray[np.float32]:
        """Share of calibration tokens that fired each stored neuron of layer i, falling, [n_ff]."""
        return _vector(self.file, f"blk.{i}.ffn_frequency.weight", np.float32)


def open_artifact(path: Path) -> Artifact:
    """Reads and checks the header: container, keys, tensor names, types, shapes, and each layer's neuron order.

    Errors: what read_gguf refuses; no artifact of ours or one of a newer format; a key or tensor that is missing,
    superfluous or not what the others demand.
    """
    file = read_gguf(path, strict=True)
    keys = _Keys(file)
    if layout.KEY_VERSION not in file.metadata:
        raise PowerinferError(
            f"{path}: expected an artifact of powerinfer, found a GGUF file of another program; make one with: "
            f"powerinfer build {path} --corpus FILE -o ARTIFACT.gguf",
            "mismatch",
        )
    version, newest = keys.integer(layout.KEY_VERSION, 1), layout.FORMAT_VERSION
    if version > newest:
        raise PowerinferError(f"{path}: format {version} is newer than this program reads ({newest})", "unsupported")
    if version < newest:
        raise PowerinferError(
            f"{path}: format {version} is older than this program reads ({newest}): build it again with --force",
            "unsupported",
        )
    config = _config(file, keys)
    artifact = Artifact(
        path=path,
        config=config,
        quant=keys.choice(layout.KEY_QUANT, layout.QUANTS),
        plans=_plans(file, keys, config),
        predictor_relu=keys.of(layout.KEY_PREDICTOR_RELU, bool),
        predictor_input=keys.choice(layout.KEY_PREDICTOR_INPUT, layout.PREDICTOR_INPUTS),
        placement=_placement(keys, config),
        tokenizer_json=keys.of(layout.KEY_TOKENIZER, str),
        chat_template=keys.of(layout.KEY_TEMPLATE, str) if layout.KEY_TEMPLATE in file.metadata else None,
        special=_special(keys, config),
        provenance=keys.json_object(layout.KEY_PROVENANCE),
        data_sha256=keys.of(layout.KEY_DATA_SHA256, str),
        file=file,
    )
    _check_tensors(artifact)
    for i in range(config.n_layer):
        _check_order(artifact, i)
        _check_experts(artifact, i)
    return artifact


def verify(path: Path) -> None:
    """Reads every byte of the artifact at `path`. Errors: as open_artifact; data that are not what split wrote."""
    artifact = open_artifact(path)
    found = sha256_file(path, artifact.file.data_offset)
    if found != artifact.data_sha256:
        expected = artifact.data_sha256
        raise PowerinferError(f"{path}: tensor data: expected SHA-256 {expected}, found {found}", "malformed")


class _Keys:
    """Typed access to the metadata; every error names file, key, what was expected and what was found."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file

    def fail(self, key: str, expected: str, found: object, kind: str = "malformed") -> PowerinferError:
        return PowerinferError(f"{self.file.path}: {key}: expected {expected}, found {found!r:.80}", kind)

    def of(self, key: str, kind: type[T]) -> T:
        if key not in self.file.metadata:
            raise PowerinferError(f"{self.file.path}: {key}: expected a {kind.__name__}, found no such key", "mismatch")
        value = self.file.metadata[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.fail(key, f"a {kind.__name__}", value, "mismatch")
        return value

    def integer(self, key: str, low: int, high: int = 2**31 - 1) -> int:
        value = self.of(key, int)
        if not low <= value <= high:
            raise self.fail(key, f"an integer in {low} .. {high}", value)
        return value

    def positive(self, key: str) -> float:
        value = self.of(key, float)
        if not (math.isfinite(value) and value > 0):
            raise self.fail(key, "a number above 0", value)
        return _shortest(value)

    def not_negative(self, key: str) -> float:
        value = self.of(key, float)
        if not (math.isfinite(value) and value >= 0):
            raise self.fail(key, "a finite number, 0 or above", value)
        return _shortest(value)

    def choice(self, key: str, allowed: tuple[str, ...]) -> str:
        value = self.of(key, str)
        if value not in allowed:
            raise self.fail(key, f"one of {', '.join(allowed)}", value, "unsupported")
        return value

    def integers(self, key: str, n: int, low: int, high: int) -> list[int]:
        """One integer in low .. high for each of n layers."""
        values = self._layers(key, n)
        for i, value in enumerate(values):
            if type(value) is not int or not low <= value <= high:
                raise self.fail(f"{key}[{i}]", f"an integer in {low} .. {high}", value)
        return values

    def thresholds(self, key: str, n: int) -> tuple[float, ...]:
        values = self._layers(key, n)
        for i, value in enumerate(values):
            if type(value) is not float or not (math.isfinite(value) and value >= 0):
                raise self.fail(f"{key}[{i}]", "a finite number, 0 or above", value)
        return tuple(values)

    def json_object(self, key: str) -> dict[str, Any]:
        text = self.of(key, str)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise self.fail(key, "a JSON object", text)
        return value

    def _layers(self, key: str, n: int) -> list[Any]:
        values: list[Any] = self.of(key, list)
        if len(values) != n:
            raise self.fail(key, f"{n} numbers, one a layer", f"{len(values)} numbers", "mismatch")
        return values


def _config(file: GgufFile, keys: _Keys) -> Config:
    arch = keys.of("general.architecture", str)
    if not re.fullmatch(ARCH_PATTERN, arch):
        raise keys.fail("general.architecture", "a short name in lower case", arch)
    norm = keys.choice(layout.KEY_NORM, NORMS)

    def size(key: str, limit: int = MAX_SIZE) -> int:
        return keys.integer(f"{arch}.{key}", 1, limit)

    n_layer = size("block_count", MAX_LAYERS)
    rope, rotary = _rope(file, keys, arch, n_layer)
    config = Config(
        arch=arch,
        name=keys.of("general.name", str),
        n_layer=n_layer,
        n_embd=size("embedding_length"),
        n_ff=size("feed_forward_length"),
        n_head=size("attention.head_count", MAX_HEAD),
        n_head_kv=size("attention.head_count_kv", MAX_HEAD),
        head_dim=size("attention.key_length", MAX_HEAD),
        n_vocab=size("vocab_size"),
        n_ctx=size("context_length", MAX_CTX),
        norm_eps=keys.positive(f"{arch}.{layout.norm_key(norm)}"),
        activation=keys.choice(layout.KEY_ACTIVATION, ACTIVATIONS),
        gated=keys.of(layout.KEY_GATED, bool),
        tied=keys.of(layout.KEY_TIED, bool),
        rope=rope,
        thresholds=keys.thresholds(layout.KEY_THRESHOLDS, n_layer),
        norm=norm,
        learned_positions=keys.of(layout.KEY_LEARNED_POSITIONS, bool),
        parallel=keys.of(layout.KEY_PARALLEL, bool),
        qk_norm=keys.of(layout.KEY_QK_NORM, bool),
        sub_norms=keys.of(layout.KEY_SUB_NORMS, bool),
        softcap=keys.not_negative(layout.KEY_SOFTCAP),
        rotary=rotary,
        experts=_experts(keys) if layout.KEY_EXPERTS in file.metadata else None,
    )
    if config.n_head % config.n_head_kv:
        raise keys.fail(f"{arch}.attention.head_count_kv", f"a divisor of {config.n_head}", config.n_head_kv)
    if config.experts is not None and config.n_ff % config.experts.n:
        raise keys.fail(layout.KEY_EXPERTS, f"a divisor of {config.n_ff}", config.experts.n)
    for key, found in ((layout.KEY_SUB_NORMS, config.sub_norms), (layout.KEY_PARALLEL, config.parallel)):
        if config.experts is not None and found:
            raise keys.fail(key, "false beside experts", found, "unsupported")
    return config


def _experts(keys: _Keys) -> Experts:
    n = keys.integer(layout.KEY_EXPERTS, 1, MAX_EXPERTS)
    return Experts(
        n=n,
        n_used=keys.integer(layout.KEY_EXPERTS_USED, 1, n),
        gating=keys.choice(layout.KEY_GATING, GATINGS),
        routed_by=keys.choice(layout.KEY_ROUTED_BY, ROUTER_INPUTS),
    )


def _rope(file: GgufFile, keys: _Keys, arch: str, n_layer: int) -> tuple[Rope | None, tuple[bool, ...]]:
    """The rope, and which layers rotate: () where all or none do."""
    name, key = "rope_inv_freq.weight", f"{arch}.rope.dimension_count"
    if layout.KEY_ROTARY not in file.metadata and name not in file.tensors:
        return None, ()
    rotary = tuple(map(bool, keys.integers(layout.KEY_ROTARY, n_layer, 0, 1)))
    n, head_dim = keys.integer(key, 2), keys.integer(f"{arch}.attention.key_length", 1, MAX_HEAD)
    if n % 2 or n > head_dim:
        raise keys.fail(key, f"an even number up to {head_dim}", n)
    _check_tensor(file, TensorPlan(name, "f32", (n // 2,)))
    rope = Rope(_vector(file, name, np.float32), keys.positive(layout.KEY_ROPE_SCALE))
    if not np.isfinite(rope.inv_freq).all():
        raise keys.fail(name, "finite numbers", rope.inv_freq[~np.isfinite(rope.inv_freq)][0])
    return rope, () if all(rotary) else rotary


def _plans(file: GgufFile, keys: _Keys, config: Config) -> list[LayerPlan]:
    modes = keys.integers(layout.KEY_MODES, config.n_layer, MODE_GATE, MODE_PREDICTOR)
    always = keys.integers(layout.KEY_ALWAYS, config.n_layer, 0, config.n_ff - 1)
    return [LayerPlan(mode, _rank(file, i, mode), k) for i, (mode, k) in enumerate(zip(modes, always, strict=True))]


def _rank(file: GgufFile, i: int, mode: int) -> int:
    """The predictor's rank is known from its first matrix alone."""
    if mode == MODE_GATE:
        return 0
    tensor = file.tensors.get(f"blk.{i}.predictor_in.weight")
    return tensor.shape[1] if tensor is not None and len(tensor.shape) == 2 else 1


def _placement(keys: _Keys, config: Config) -> tuple[list[int], list[int]] | None:
    if layout.KEY_PLACEMENT_RAM not in keys.file.metadata:
        return None
    vram = keys.integers(layout.KEY_PLACEMENT_VRAM, config.n_layer, 0, config.n_ff)
    ram = keys.integers(layout.KEY_PLACEMENT_RAM, config.n_layer, 0, config.n_ff)
    for i, (k1, k2) in enumerate(zip(vram, ram, strict=True)):
        if k1 > k2:
            raise keys.fail(f"{layout.KEY_PLACEMENT_RAM}[{i}]", f"at least the {k1} neurons in VRAM", k2)
    return vram, ram


def _special(keys: _Keys, config: Config) -> dict[str, Any]:
    special = keys.json_object(layout.KEY_SPECIAL)
    eos = special.get("eos") or []
    ids = eos if isinstance(eos, list) else [eos]
    if special.get("bos") is not None:
        ids = [special["bos"], *ids]
    for token in ids:
        if type(token) is not int or not 0 <= token < config.n_vocab:
            raise keys.fail(layout.KEY_SPECIAL, f"token ids in 0 .. {config.n_vocab - 1}", token)
    return special


def _check_tensors(artifact: Artifact) -> None:
    """Exactly the tensors that layout.tensor_table demands, in its order."""
    file, config = artifact.file, artifact.config
    table = tensor_table(config, artifact.plans, artifact.quant, _biases(file, config), artifact.head)
    for plan in table:
        _check_tensor(file, plan)
    expected = {plan.name for plan in table}
    for name in file.tensors:
        if name not in expected:
            raise PowerinferError(f"{file.path}: {name}: expected no such tensor, found one", "mismatch")


def _biases(file: GgufFile, config: Config) -> frozenset[str]:
    """The bias tensors that must be there: a bias in one layer is one in all, and LayerNorms have them."""
    found = {name for name in file.tensors if name.endswith(".bias")}
    parts = {name.split(".", 2)[2] for name in found if name.startswith("blk.") and name.count(".") == 3}
    parts -= {"predictor_out.bias"}
    if config.norm == "layer":
        found.add("output_norm.bias")
        parts |= {"attn_norm.bias", "ffn_norm.bias"}
    return frozenset(found | {f"blk.{i}.{part}" for i in range(config.n_layer) for part in parts})


def _check_tensor(file: GgufFile, plan: TensorPlan) -> None:
    found = file.tensors.get(plan.name)
    expected = f"{file.path}: {plan.name}: expected {plan.type.upper()} {list(plan.shape)}"
    if found is None:
        raise PowerinferError(f"{expected}, found no such tensor", "mismatch")
    if (found.type, found.shape) != (layout.TYPE_ID[plan.type], plan.shape):
        raise PowerinferError(f"{expected}, found {_TYPE_NAME[found.type]} {list(found.shape)}", "mismatch")


def _check_order(artifact: Artifact, i: int) -> None:
    """Each neuron of the checkpoint is stored once, the frequent ones first."""
    order, n_ff = artifact.order(i), artifact.config.n_ff
    where = f"{artifact.path}: blk.{i}.ffn_order.weight"
    outside = np.flatnonzero((order < 0) | (order >= n_ff))
    if len(outside):
        at = int(outside[0])
        raise PowerinferError(f"{where}[{at}]: expected a neuron in 0 .. {n_ff - 1}, found {order[at]}", "malformed")
    repeated = np.flatnonzero(np.bincount(order, minlength=n_ff) > 1)
    if len(repeated):
        raise PowerinferError(f"{where}: expected each neuron once, found {repeated[0]} more often", "malformed")
    frequency = artifact.frequency(i)
    if not (frequency[0] <= 1 and frequency[-1] >= 0 and (np.diff(frequency) <= 0).all()):
        name = f"blk.{i}.ffn_frequency.weight"
        raise PowerinferError(
            f"{artifact.path}: {name}: expected shares that fall from 1 to 0, found others", "malformed"
        )


def _check_experts(artifact: Artifact, i: int) -> None:
    """Each stored neuron's expert is the one that the checkpoint has it in."""
    config = artifact.config
    if config.experts is None:
        return
    name = f"blk.{i}.ffn_expert.weight"
    found, expected = _vector(artifact.file, name, np.int32), artifact.order(i) // (config.n_ff // config.experts.n)
    wrong = np.flatnonzero(found != expected)
    if len(wrong):
        at = int(wrong[0])
        raise PowerinferError(
            f"{artifact.path}: {name}[{at}]: expected expert {expected[at]}, found {found[at]}", "malformed"
        )


def _vector(file: GgufFile, name: str, dtype: Any) -> npt.NDArray[Any]:
    tensor = file.tensors[name]
    return np.fromfile(file.path, dtype, tensor.shape[0], offset=tensor.offset)


def _shortest(value: float) -> float:
    """The float64 that a float32 was written from: 1e-05 and not 9.99999974737875e-06."""
    return float(str(np.float32(value)))
