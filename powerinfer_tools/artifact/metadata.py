"""The artifact's keys and values: the standard ones that any GGUF tool lists, and ours."""

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from powerinfer_tools.artifact import layout
from powerinfer_tools.artifact.gguf_writer import Value
from powerinfer_tools.checkpoint.config import Config, Experts
from powerinfer_tools.checkpoint.source import Checkpoint
from powerinfer_tools.files import canonical_json

if TYPE_CHECKING:
    from powerinfer_tools.predictors import Predictors

_FILE_TYPE = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7}  # llama.cpp's numbers of "mostly ..."
_DESCRIPTIVE = ("author", "organization", "description", "version", "license", "url")
_QUANTIZATION_VERSION = 2  # of ggml's block layouts
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # token types of tokenizer.ggml


def artifact_metadata(
    checkpoint: Checkpoint,
    plans: list[layout.LayerPlan],
    quant: str,
    predictors: "Predictors | None",
    placement: tuple[list[int], list[int]] | None,
    provenance: dict[str, Any],
) -> dict[str, Value]:
    """All keys but the data's digest. placement: k1 and k2, one a layer."""
    values = general_keys(checkpoint, quant) | model_keys(checkpoint.config) | tokenizer_keys(checkpoint)
    values |= {
        layout.KEY_VERSION: layout.FORMAT_VERSION,
        layout.KEY_MODES: np.array([plan.mode for plan in plans], np.int32),
        layout.KEY_ALWAYS: np.array([plan.always for plan in plans], np.int32),
        layout.KEY_PREDICTOR_RELU: predictors.relu if predictors is not None else False,
        layout.KEY_PREDICTOR_INPUT: predictors.input if predictors is not None else layout.INPUT_FFN,
        layout.KEY_QUANT: quant,
        layout.KEY_PROVENANCE: canonical_json(provenance),
    }
    if placement is not None:
        values[layout.KEY_PLACEMENT_VRAM] = np.array(placement[0], np.int32)
        values[layout.KEY_PLACEMENT_RAM] = np.array(placement[1], np.int32)
    return values


def general_keys(checkpoint: Checkpoint, quant: str) -> dict[str, Value]:
    """What the file is, whose model it holds, and under which licence, as far as the checkpoint says."""
    values: dict[str, Value] = {
        "general.architecture": checkpoint.config.arch,
        "general.type": "model",
        "general.name": checkpoint.config.name,
        "general.alignment": layout.ALIGNMENT,
        "general.quantization_version": _QUANTIZATION_VERSION,
        "general.file_type": _FILE_TYPE[quant],
    }
    known = checkpoint.metadata
    values |= {f"general.{key}": known[key] for key in _DESCRIPTIVE if key in known}
    if "base_model" in known:
        values["general.base_model.count"] = 1
        values["general.base_model.0.name"] = known["base_model"]
    return values


def model_keys(config: Config) -> dict[str, Value]:
    """Sizes and choices of the model."""
    sizes: dict[str, Value] = {
        "block_count": config.n_layer,
        "context_length": config.n_ctx,
        "embedding_length": config.n_embd,
        "feed_forward_length": config.n_ff,
        "attention.head_count": config.n_head,
        "attention.head_count_kv": config.n_head_kv,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        layout.norm_key(config.norm): float(config.norm_eps),
        "vocab_size": config.n_vocab,
    }
    values = {f"{config.arch}.{key}": value for key, value in sizes.items()}
    if config.rope is not None:
        values[f"{config.arch}.rope.dimension_count"] = 2 * len(config.rope.inv_freq)
        values[layout.KEY_ROPE_SCALE] = float(config.rope.scale)
        rotates = [config.rope_of(i) is not None for i in range(config.n_layer)]
        values[layout.KEY_ROTARY] = np.array(rotates, np.int32)
    if config.experts is not None:
        values |= expert_keys(config.experts)
    return values | {
        layout.KEY_ACTIVATION: config.activation,
        layout.KEY_GATED: config.gated,
        layout.KEY_TIED: config.tied,
        layout.KEY_THRESHOLDS: np.array(config.thresholds, np.float32),
        layout.KEY_NORM: config.norm,
        layout.KEY_LEARNED_POSITIONS: config.learned_positions,
        layout.KEY_PARALLEL: config.parallel,
        layout.KEY_QK_NORM: config.qk_norm,
        layout.KEY_SUB_NORMS: config.sub_norms,
        layout.KEY_SOFTCAP: float(config.softcap),
    }


def expert_keys(experts: Experts) -> dict[str, Value]:
    """How experts are chosen."""
    return {
        layout.KEY_EXPERTS: experts.n,
        layout.KEY_EXPERTS_USED: experts.n_used,
        layout.KEY_GATING: experts.gating,
        layout.KEY_ROUTED_BY: experts.routed_by,
    }


def tokenizer_keys(checkpoint: Checkpoint) -> dict[str, Value]:
    """The tokenizer verbatim, and the token list for tools that only show it."""
    special = checkpoint.special
    tokenizer = json.loads(checkpoint.tokenizer_json)
    tokens, types = token_list(tokenizer, checkpoint.config.n_vocab)
    values: dict[str, Value] = {
        layout.KEY_TOKENIZER: checkpoint.tokenizer_json,
        layout.KEY_SPECIAL: canonical_json(special),
        "tokenizer.ggml.model": "llama" if _has_byte_tokens(tokenizer) else "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
    }
    if special.get("bos") is not None:
        values["tokenizer.ggml.bos_token_id"] = int(special["bos"])
    if special.get("eos"):
        values["tokenizer.ggml.eos_token_id"] = int(special["eos"][0])
    values["tokenizer.ggml.add_bos_token"] = bool(special.get("add_bos", False))
    if checkpoint.chat_template is not None:
        values[layout.KEY_TEMPLATE] = checkpoint.chat_template
    return values


def token_list(tokenizer: dict[str, Any], n_vocab: int) -> tuple[list[str], Any]:
    """Texts and types (int32) of the ids 0 .. n_vocab - 1; ids that the tokenizer has no text for are unused."""
    tokens = [f"[PAD{i}]" for i in range(n_vocab)]
    types = np.full(n_vocab, _UNUSED, np.int32)
    model = tokenizer["model"]
    vocab = model["vocab"]  # text: id, or (Unigram) [text, score] in the order of ids
    pairs = vocab.items() if isinstance(vocab, dict) else [(entry[0], i) for i, entry in enumerate(vocab)]
    entries = [(text, i, _type_of(text, model, i)) for text, i in pairs]
    for added in tokenizer.get("added_tokens") or []:
        kind = _CONTROL if added.get("special") else _USER_DEFINED
        entries.append((added["content"], added["id"], kind))
    for text, i, kind in entries:
        if 0 <= i < n_vocab:
            tokens[i], types[i] = text, kind
    return tokens, types


def _type_of(text: str, model: dict[str, Any], i: int) -> int:
    if text == model.get("unk_token") or model.get("unk_id") == i:
        return _UNKNOWN
    is_byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
    return _BYTE if is_byte else _NORMAL


def _has_byte_tokens(tokenizer: dict[str, Any]) -> bool:
    return bool(tokenizer["model"].get("byte_fallback"))
