"""What the keys of the GGUF architectures have in common, as llama.cpp writes them."""

from dataclasses import dataclass

import numpy as np

from powerinfer_tools.artifact.layout import KEY_ACTIVATION, KEY_THRESHOLDS
from powerinfer_tools.checkpoint.config import ACTIVATIONS, Config, Rope
from powerinfer_tools.checkpoint.fields import Fields
from powerinfer_tools.checkpoint.gguf_file import GgufFile, raw_rows
from powerinfer_tools.checkpoint.huggingface_config import HIDDEN_ACTS, MAX_LAYERS
from powerinfer_tools.checkpoint.rope import finish, frequencies, yarn, yarn_scale
from powerinfer_tools.checkpoint.source import FloatArray
from powerinfer_tools.checkpoint.sources import Rows, Source, picked, stored
from powerinfer_tools.checkpoint.tensors import bias_shapes, required_shapes
from powerinfer_tools.errors import PowerinferError

HIDDEN_ACT = "hidden_activation"  # llama.cpp's key, behind the architecture's name
ROPE_FACTORS = "rope_freqs.weight"  # each frequency is divided by its own (Llama 3.1)
NORM_EPS = {"rms": "attention.layer_norm_rms_epsilon", "layer": "attention.layer_norm_epsilon"}

# every key of an architecture that is understood; another one might change what the model computes
KEYS = frozenset(
    (
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "vocab_size",
        "tensor_data_layout",
        HIDDEN_ACT,
        "expert_count",
        "expert_used_count",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
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


@dataclass(frozen=True)
class Header:
    """What a GGUF file says. fields: all keys; keys: those of its architecture, without its name; activation: what the
    user says that it is, if anything; notes: to be added to, for the user.
    """

    file: GgufFile
    fields: Fields
    keys: Fields
    activation: str | None
    notes: list[str]


def read_gguf_config(
    header: Header,
    arch: str,
    activation: str,
    *,
    gated: bool = True,
    norm: str = "rms",
    partial_rotary: bool = False,
    known: frozenset[str] = frozenset(),
    experts: bool = False,
) -> Config:
    """The sizes and choices of a plain model. activation: what llama.cpp computes where the file does not say; experts:
    it may have some, and n_ff is then one expert's.

    Errors: a key that is not understood; sizes that do not go together; partial rotation where it is not expected.
    """
    keys, file = header.keys, header.file
    _check_keys(keys, KEYS | known | {NORM_EPS[norm]}, experts)
    n_embd, n_head = keys.integer("embedding_length"), keys.integer("attention.head_count")
    n_head_kv = keys.integer("attention.head_count_kv", n_head)
    if n_head % n_head_kv:
        raise keys.error("attention.head_count_kv", f"a divisor of {n_head}", n_head_kv)
    n_layer = keys.integer("block_count", high=MAX_LAYERS)
    name, thresholds = _activation(header, n_layer, activation)
    head_dim = _head_dim(keys, n_embd, n_head)
    return Config(
        arch=arch,
        name=header.fields.text("general.name", file.path.stem),
        n_layer=n_layer,
        n_embd=n_embd,
        n_ff=keys.integer("feed_forward_length"),
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        n_vocab=_n_vocab(header),
        n_ctx=keys.integer("context_length"),
        norm_eps=keys.number(NORM_EPS[norm], high=1.0),
        activation=name,
        gated=gated,
        tied="output.weight" not in file.tensors,
        rope=_rope(keys, file, _rotary_dim(keys, head_dim, partial_rotary)),
        thresholds=thresholds,
        norm=norm,
    )


def gguf_sources(header: Header, config: Config) -> dict[str, Source]:
    """Each of our tensors under its own name, and the biases that the file has."""
    biases = {name: shape for name, shape in bias_shapes(config).items() if name in header.file.tensors}
    return {name: stored(name, shape) for name, shape in (required_shapes(config) | biases).items()}


def interleaved(sources: dict[str, Source], head_dim: int) -> dict[str, Source]:
    """The same, of an architecture whose q and k rows llama.cpp stores in interleaved rotary layout."""

    def index(rows: Rows) -> Rows:
        """Of a head, the first half lies in the even rows, the second in the odd ones."""
        head, row = np.divmod(rows, head_dim)
        half, pair = np.divmod(row, head_dim // 2)
        theirs: Rows = head * head_dim + 2 * pair + half
        return theirs

    def source(name: str, plain: Source) -> Source:
        if name.split(".")[-2] not in ("attn_q", "attn_k"):
            return plain
        return picked(name, plain.shape, plain.shape[0], index)

    return {name: source(name, plain) for name, plain in sources.items()}


def _check_keys(keys: Fields, known: frozenset[str], experts: bool) -> None:
    for key in keys.values:
        name = key.removeprefix(keys.prefix)
        if key.startswith(keys.prefix) and name not in known:
            raise keys.unsupported(name, "no such key, for what it changes is not known here")
    for name in ("expert_count", "expert_used_count"):
        if not experts and keys.get(name, 0) != 0:
            raise keys.unsupported(name, "0, no experts")


def _activation(header: Header, n_layer: int, default: str) -> tuple[str, tuple[float, ...]]:
    """The activation and its threshold a layer: from the file's keys, from the user, or the architecture's.

    The user may give fatrelu's threshold with it: fatrelu:0.03.
    """
    fields, known = header.fields, ", ".join(ACTIVATIONS)
    asked, threshold = _asked(header)
    recorded = _recorded(header)
    if asked and recorded not in (None, asked):
        raise PowerinferError(f"{fields.where}: records the activation {recorded}, expected {asked}", "usage")
    name = recorded or asked or default
    if name not in ACTIVATIONS:
        found = f"{default}, which GGUF does not record; a ReLU model needs --activation"
        raise PowerinferError(f"{fields.where}: expected an activation of {known}, found {found}", "unsupported")
    if not (recorded or asked) and name == "silu":
        header.notes.append(f"GGUF does not record the activation: taken as {name}; a ReLU model needs --activation")
    thresholds = fields.get(KEY_THRESHOLDS, None if threshold is None else [threshold] * n_layer)
    if thresholds is None and name != "fatrelu":
        return name, (0.0,) * n_layer
    numbers = isinstance(thresholds, list) and all(isinstance(t, float) and 0 <= t < 1e6 for t in thresholds)
    if thresholds is None or not numbers or len(thresholds) != n_layer:
        expected = f"{n_layer} numbers, not negative, or --activation fatrelu:NUMBER"
        raise fields.error(KEY_THRESHOLDS, expected, thresholds)
    return name, tuple(float(t) for t in thresholds)


def _recorded(header: Header) -> str | None:
    """The activation by our own key, or by llama.cpp's, which only its newest conversions write."""
    if KEY_ACTIVATION in header.fields:
        return header.fields.choice(KEY_ACTIVATION, ACTIVATIONS)
    return HIDDEN_ACTS[header.keys.choice(HIDDEN_ACT, HIDDEN_ACTS)] if HIDDEN_ACT in header.keys else None


def _asked(header: Header) -> tuple[str, float | None]:
    """The activation that the user gives, "" for none, and its threshold. Errors: an unknown one, no number."""
    name, _, number = (header.activation or "").partition(":")
    if name not in ("", *ACTIVATIONS):
        known = ", ".join(ACTIVATIONS)
        raise PowerinferError(f"{header.fields.where}: expected an activation of {known}, found {name}", "usage")
    if not number:
        return name, None
    try:
        threshold = float(number)
    except ValueError:
        threshold = -1.0
    if name != "fatrelu" or not 0 <= threshold < 1e6 or KEY_THRESHOLDS in header.fields:
        expected = "a threshold with fatrelu alone, such as fatrelu:0.03, and none that the file records"
        raise PowerinferError(f"{header.fields.where}: expected {expected}, found {header.activation}", "usage")
    return name, threshold


def _head_dim(keys: Fields, n_embd: int, n_head: int) -> int:
    if "attention.key_length" not in keys and n_embd % n_head:
        raise keys.error("attention.head_count", f"a divisor of embedding_length {n_embd}", n_head)
    head_dim = keys.integer("attention.key_length", n_embd // n_head, low=2)
    if keys.integer("attention.value_length", head_dim) != head_dim:
        raise keys.unsupported("attention.value_length", f"{head_dim}, the length of a key")
    if head_dim % 2:
        raise keys.error("attention.key_length", "an even number", head_dim)
    return head_dim


def _rotary_dim(keys: Fields, head_dim: int, partial: bool) -> int:
    """The dimensions of a head that rotate."""
    n = keys.integer("rope.dimension_count", head_dim, high=head_dim)
    if n % 2 or (n != head_dim and not partial):
        expected = f"an even number, at most {head_dim}" if partial else f"{head_dim}, the length of a key"
        raise keys.unsupported("rope.dimension_count", expected)
    return n


def _n_vocab(header: Header) -> int:
    """The rows of the embedding; the vocabulary that the tokenizer lists may not exceed them."""
    fields, keys = header.fields, header.keys
    embedding = header.file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise PowerinferError(f"{fields.where}: expected token_embd.weight, a matrix, found none", "mismatch")
    n_vocab = embedding.shape[1]
    if (said := keys.integer("vocab_size", n_vocab)) != n_vocab:
        raise keys.error("vocab_size", f"{n_vocab}, the rows of token_embd", said)
    tokens = fields.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) > n_vocab:
        raise fields.error("tokenizer.ggml.tokens", f"at most {n_vocab} tokens", len(tokens))
    return n_vocab


def _rope(keys: Fields, file: GgufFile, rotary_dim: int) -> Rope:
    """llama.cpp's definition: a factor without a type means linear; yarn multiplies attn_factor."""
    theta = keys.number("rope.freq_base", 10000.0, low=1.0)
    freq = frequencies(theta, rotary_dim)
    if ROPE_FACTORS in file.tensors:
        freq = freq / _rope_factors(file, rotary_dim)
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    kind = keys.text("rope.scaling.type", "linear")
    if kind == "none":
        return finish(freq)
    if kind == "linear":
        return finish(freq / factor)
    if kind != "yarn":
        raise keys.unsupported("rope.scaling.type", "none, linear or yarn")
    n_original = keys.integer("rope.scaling.original_context_length", keys.integer("context_length"))
    fast = keys.number("rope.scaling.yarn_beta_fast", 32.0)
    slow = keys.number("rope.scaling.yarn_beta_slow", 1.0)
    scale = keys.number("rope.scaling.attn_factor", 1.0) * yarn_scale(factor)
    return finish(yarn(freq, theta, factor, n_original, fast, slow), scale)


def _rope_factors(file: GgufFile, rotary_dim: int) -> FloatArray:
    """Llama 3.1's scaling as llama.cpp keeps it: a divisor for each frequency."""
    tensor = file.tensors[ROPE_FACTORS]
    where = f"{file.path}: {ROPE_FACTORS}"
    if tensor.shape != (rotary_dim // 2,) or tensor.type != 0:
        raise PowerinferError(f"{where}: expected F32 [{rotary_dim // 2}], found {list(tensor.shape)}", "mismatch")
    factors: FloatArray = raw_rows(file, ROPE_FACTORS)[0].view(np.float32)
    if not (np.isfinite(factors) & (factors > 0)).all():
        raise PowerinferError(f"{where}: expected positive numbers, found others", "malformed")
    return factors
