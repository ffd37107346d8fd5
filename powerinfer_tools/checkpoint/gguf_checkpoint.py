"""A GGUF file of the llama architecture, as llama.cpp writes it: any type that the gguf package dequantises."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from powerinfer_tools.artifact.layout import KEY_ACTIVATION, KEY_THRESHOLDS, KEY_VERSION
from powerinfer_tools.checkpoint.config import ACTIVATIONS, Config, Rope
from powerinfer_tools.checkpoint.fields import Fields
from powerinfer_tools.checkpoint.gguf_file import GgufFile, raw_rows, read_gguf
from powerinfer_tools.checkpoint.gguf_tokenizer import read_special, rebuild_tokenizer
from powerinfer_tools.checkpoint.huggingface_tokenizer import TEMPLATE_LIMIT
from powerinfer_tools.checkpoint.rope import finish, frequencies, yarn, yarn_scale
from powerinfer_tools.checkpoint.source import Checkpoint, FloatArray, check_rows
from powerinfer_tools.checkpoint.tensors import Shapes, bias_shapes, required_shapes
from powerinfer_tools.errors import PowerinferError

CHUNK = 1 << 22  # elements dequantised at once
ROPE_FACTORS = "rope_freqs.weight"  # each frequency is divided by its own (Llama 3.1)
SILU_NOTE = "GGUF does not record the activation: taken as silu; a ReLU model needs --activation"
DESCRIPTIONS = ("name", "license", "license.name", "license.link", "organization", "author", "url")

# every llama.* key that is understood; another one might change what the model computes
KEYS = frozenset(
    f"llama.{key}"
    for key in (
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "vocab_size",
        "tensor_data_layout",
        "expert_count",
        "expert_used_count",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scale_linear",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.finetuned",
        "rope.scaling.original_context_length",
        "rope.scaling.attn_factor",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
    )
)


class GgufCheckpoint(Checkpoint):
    """The header is read at once; rows are dequantised when they are asked for."""

    def __init__(self, path: Path, activation: str | None = None) -> None:
        self.path, self.notes = path, []
        self._file = read_gguf(path, strict=False)
        fields = Fields(str(path), {key: _one(key, v) for key, v in self._file.metadata.items()})
        _check_kind(fields)
        self.config = _read_config(fields, self._file, activation, self.notes)
        self._activation = self.config.activation
        self._shapes = _match(self._file, self.config)
        self.tokenizer_json = rebuild_tokenizer(fields)
        self.special = read_special(fields)
        self.chat_template = _template(fields)
        described = {key: fields.values.get(f"general.{key}") for key in DESCRIPTIONS}
        self.metadata = {key: value for key, value in described.items() if isinstance(value, str)}
        self.metadata["name"] = self.config.name
        if not self.special["eos"]:
            self.notes.append("no end-of-text token is recorded: answers end at the token limit")

    def names(self) -> frozenset[str]:
        return frozenset(self._shapes)

    def read(self, name: str, rows: slice | None = None) -> FloatArray:
        begin, end = check_rows(self.path, self._shapes, name, rows)
        if len(self._shapes[name]) == 1:
            row = self._dequantize(name, np.arange(1))[0]
            return np.ascontiguousarray(row[self._stored_rows(name)[begin:end]])
        return self._dequantize(name, self._stored_rows(name)[begin:end])

    def digest(self) -> str:
        digest = hashlib.sha256(f"activation {self._activation}\n".encode())
        with self.path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()

    def _stored_rows(self, name: str) -> npt.NDArray[np.int64]:
        """Where the file has each of our rows: q and k are stored in interleaved rotary layout."""
        n, part = self._shapes[name][0], name.split(".")[-2]
        if part not in ("attn_q", "attn_k"):
            return np.arange(n)
        pairs = np.arange(n).reshape(-1, self.config.head_dim // 2, 2)  # (2j, 2j + 1) of each head
        return np.ravel(pairs.swapaxes(1, 2))  # the first of each of a head's pairs, then the second ones

    def _dequantize(self, name: str, rows: npt.NDArray[np.int64]) -> FloatArray:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        kind = GGMLQuantizationType(self._file.tensors[name].type)
        raw = raw_rows(self._file, name)
        n = self._file.tensors[name].shape[0]
        floats = np.empty((len(rows), n), np.float32)
        step = max(1, CHUNK // n)
        try:
            for start in range(0, len(rows), step):
                part = slice(start, start + step)
                floats[part] = dequantize(np.ascontiguousarray(raw[rows[part]]), kind)
        except NotImplementedError as error:
            where = f"{self.path}: {name}"
            raise PowerinferError(
                f"{where}: expected a type that can be dequantised, found {kind.name}", "unsupported"
            ) from error
        return floats


def _one(key: str, value: Any) -> Any:
    """A size that is written once for each layer, as one number where all layers agree."""
    if key.startswith("llama.") and isinstance(value, list) and value and all(v == value[0] for v in value):
        return value[0]
    return value


def _check_kind(fields: Fields) -> None:
    if KEY_VERSION in fields:
        raise PowerinferError(f"{fields.where}: expected a checkpoint, found a powerinfer artifact", "mismatch")
    if fields.text("general.architecture") != "llama":
        raise fields.unsupported("general.architecture", "llama")
    for key in fields.values:
        if key.startswith("llama.") and key not in KEYS:
            raise fields.unsupported(key, "no such key, for what it changes is not known here")
    for key in ("llama.expert_count", "llama.expert_used_count"):
        if fields.values.get(key, 0) != 0:
            raise fields.unsupported(key, "0, no experts")


def _read_config(fields: Fields, file: GgufFile, activation: str | None, notes: list[str]) -> Config:
    n_embd = fields.integer("llama.embedding_length")
    n_head = fields.integer("llama.attention.head_count")
    n_head_kv = fields.integer("llama.attention.head_count_kv", n_head)
    if n_head % n_head_kv:
        raise fields.error("llama.attention.head_count_kv", f"a divisor of {n_head}", n_head_kv)
    n_layer = fields.integer("llama.block_count", high=4096)
    name, thresholds = _activation(fields, n_layer, activation, notes)
    head_dim = _head_dim(fields, n_embd, n_head)
    return Config(
        arch="llama",
        name=fields.text("general.name", file.path.stem),
        n_layer=n_layer,
        n_embd=n_embd,
        n_ff=fields.integer("llama.feed_forward_length"),
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        n_vocab=_n_vocab(fields, file),
        n_ctx=fields.integer("llama.context_length"),
        norm_eps=fields.number("llama.attention.layer_norm_rms_epsilon", high=1.0),
        activation=name,
        gated=True,
        tied="output.weight" not in file.tensors,
        rope=_rope(fields, file, head_dim),
        thresholds=thresholds,
    )


def _activation(fields: Fields, n_layer: int, asked: str | None, notes: list[str]) -> tuple[str, tuple[float, ...]]:
    """The activation and its threshold a layer: from our own keys, from the user, or silu by definition."""
    if asked is not None and asked not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise PowerinferError(f"{fields.where}: expected an activation of {known}, found {asked}", "usage")
    name = fields.text(KEY_ACTIVATION, asked or "silu")
    if name not in ACTIVATIONS:
        raise fields.unsupported(KEY_ACTIVATION, f"one of {', '.join(ACTIVATIONS)}")
    if asked not in (None, name):
        raise PowerinferError(f"{fields.where}: records the activation {name}, expected {asked}", "usage")
    if asked is None and KEY_ACTIVATION not in fields:
        notes.append(SILU_NOTE)
    thresholds = fields.values.get(KEY_THRESHOLDS)
    if thresholds is None and name != "fatrelu":
        return name, (0.0,) * n_layer
    numbers = isinstance(thresholds, list) and all(isinstance(t, float) and 0 <= t < 1e6 for t in thresholds)
    if thresholds is None or not numbers or len(thresholds) != n_layer:
        raise fields.error(KEY_THRESHOLDS, f"{n_layer} numbers, not negative", thresholds)
    return name, tuple(float(t) for t in thresholds)


def _head_dim(fields: Fields, n_embd: int, n_head: int) -> int:
    if "llama.attention.key_length" not in fields and n_embd % n_head:
        raise fields.error("llama.attention.head_count", f"a divisor of embedding_length {n_embd}", n_head)
    head_dim = fields.integer("llama.attention.key_length", n_embd // n_head, low=2)
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if fields.integer(key, head_dim) != head_dim:
            raise fields.unsupported(key, f"{head_dim}, the length of a key")
    if head_dim % 2:
        raise fields.error("llama.attention.key_length", "an even number", head_dim)
    return head_dim


def _n_vocab(fields: Fields, file: GgufFile) -> int:
    """The rows of the embedding; the vocabulary that the tokenizer lists may not exceed them."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise PowerinferError(f"{fields.where}: expected token_embd.weight, a matrix, found none", "mismatch")
    n_vocab = embedding.shape[1]
    if fields.integer("llama.vocab_size", n_vocab) != n_vocab:
        raise fields.error("llama.vocab_size", f"{n_vocab}, the rows of token_embd", fields.values["llama.vocab_size"])
    tokens = fields.values.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) > n_vocab:
        raise fields.error("tokenizer.ggml.tokens", f"at most {n_vocab} tokens", len(tokens))
    return n_vocab


def _rope(fields: Fields, file: GgufFile, head_dim: int) -> Rope:
    """llama.cpp's definition: a factor without a type means linear; yarn multiplies attn_factor."""
    theta = fields.number("llama.rope.freq_base", 10000.0, low=1.0)
    freq = frequencies(theta, head_dim)
    if ROPE_FACTORS in file.tensors:
        freq = freq / _rope_factors(file, head_dim)
    key = "llama.rope.scaling.factor"
    factor = fields.number(key, fields.number("llama.rope.scale_linear", 1.0))
    kind = fields.text("llama.rope.scaling.type", "linear")
    if kind == "none":
        return finish(freq)
    if kind == "linear":
        return finish(freq / factor)
    if kind != "yarn":
        raise fields.unsupported("llama.rope.scaling.type", "none, linear or yarn")
    n_original = fields.integer("llama.rope.scaling.original_context_length", fields.integer("llama.context_length"))
    fast = fields.number("llama.rope.scaling.yarn_beta_fast", 32.0)
    slow = fields.number("llama.rope.scaling.yarn_beta_slow", 1.0)
    scale = fields.number("llama.rope.scaling.attn_factor", 1.0) * yarn_scale(factor)
    return finish(yarn(freq, theta, factor, n_original, fast, slow), scale)


def _rope_factors(file: GgufFile, head_dim: int) -> FloatArray:
    """Llama 3.1's scaling as llama.cpp keeps it: a divisor for each frequency."""
    tensor = file.tensors[ROPE_FACTORS]
    where = f"{file.path}: {ROPE_FACTORS}"
    if tensor.shape != (head_dim // 2,) or tensor.type != 0:
        raise PowerinferError(f"{where}: expected F32 [{head_dim // 2}], found {list(tensor.shape)}", "mismatch")
    factors: FloatArray = raw_rows(file, ROPE_FACTORS)[0].view(np.float32)
    if not (np.isfinite(factors) & (factors > 0)).all():
        raise PowerinferError(f"{where}: expected positive numbers, found others", "malformed")
    return factors


def _match(file: GgufFile, config: Config) -> Shapes:
    """The shapes of the tensors that the file has. Errors: one missing, of another shape, or not known."""
    needed, optional = required_shapes(config), bias_shapes(config)
    for name in needed.keys() - file.tensors.keys():
        raise PowerinferError(f"{file.path}: expected {name} {list(needed[name])}, found none", "mismatch")
    shapes: Shapes = {}
    for name, tensor in file.tensors.items():
        if name == ROPE_FACTORS:
            continue
        expected = needed.get(name) or optional.get(name)
        if expected is None:
            raise PowerinferError(f"{file.path}: {name}: expected no such tensor, found one", "unsupported")
        if tensor.shape[::-1] != expected:
            found = list(tensor.shape[::-1])
            raise PowerinferError(f"{file.path}: {name}: expected {list(expected)}, found {found}", "mismatch")
        shapes[name] = expected
    return shapes


def _template(fields: Fields) -> str | None:
    key = "tokenizer.chat_template"
    template = fields.text(key) if key in fields else None
    if template is not None and len(template.encode()) > TEMPLATE_LIMIT:
        raise fields.error(key, f"at most {TEMPLATE_LIMIT} bytes", f"{len(template)} characters", "malformed")
    return template
