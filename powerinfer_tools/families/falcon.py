"""Falcon: LayerNorm, a plain FFN beside attention (7B, 40B) or after it, q, k and v in one matrix.

Only with ReLU, as ReluFalcon: the family's own gelu is never exactly 0.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from powerinfer_tools.checkpoint.config import Config
from powerinfer_tools.checkpoint.fields import Fields
from powerinfer_tools.checkpoint.gguf_config import Header, gguf_sources, read_gguf_config
from powerinfer_tools.checkpoint.huggingface_config import (
    MAX_LAYERS,
    name_sources,
    read_activation,
    read_head_dim,
    their_name,
)
from powerinfer_tools.checkpoint.rope import rope_from_config
from powerinfer_tools.checkpoint.sources import Reading, Rows, Source, picked, stored
from powerinfer_tools.checkpoint.tensors import ATTENTION, FFN
from powerinfer_tools.families.family import Family, Pwri

Index = Callable[[Rows], Rows]  # of rows of ours, those of the matrix that holds them

QKV = ATTENTION[:3]
NAMES = {
    "token_embd": "transformer.word_embeddings",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "layer": "transformer.h",
    **dict.fromkeys(QKV, "self_attention.query_key_value"),
    "attn_output": "self_attention.dense",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}


def _folder(fields: Fields, name: str, notes: list[str]) -> Reading:
    if fields.flag("alibi", False):
        raise fields.unsupported("alibi", "false, rotary positions")
    config = _config(fields, name)
    attn_norm, ffn_norm = _norms(fields)
    names = {**NAMES, "attn_norm": attn_norm, "ffn_norm": ffn_norm}
    sources = name_sources(config, (*ATTENTION, *FFN) if fields.flag("bias", False) else (), names)
    for ours, source in sources.items():
        if (part := ours.split(".")[-2]) in QKV:
            sources[ours] = _rows_of_qkv(config, their_name(names, ours), source.shape, _grouped(config, part))
    return Reading(config, sources)


def _config(fields: Fields, name: str) -> Config:
    n_embd, n_head = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = read_head_dim(fields, n_embd, n_head)
    if head_dim * n_head != n_embd:
        raise fields.unsupported("head_dim", f"hidden_size {n_embd} / num_attention_heads {n_head}")
    n_layer = fields.integer("num_hidden_layers", high=MAX_LAYERS)
    n_ctx = fields.integer("max_position_embeddings", 2048)
    key = "activation" if "activation" in fields else "hidden_act"
    activation, thresholds = read_activation(fields, n_layer, False, key)
    return Config(
        arch="falcon",
        name=name,
        n_layer=n_layer,
        n_embd=n_embd,
        n_ff=fields.integer("ffn_hidden_size", 4 * n_embd),
        n_head=n_head,
        n_head_kv=_n_head_kv(fields, n_head),
        head_dim=head_dim,
        n_vocab=fields.integer("vocab_size"),
        n_ctx=n_ctx,
        norm_eps=fields.number("layer_norm_epsilon", 1e-5, high=1.0),
        activation=activation,
        gated=False,
        tied=fields.flag("tie_word_embeddings", True),
        rope=rope_from_config(fields, head_dim, n_ctx),
        thresholds=thresholds,
        norm="layer",
        parallel=_is_new(fields) or fields.flag("parallel_attn", True),
    )


def _is_new(fields: Fields) -> bool:
    """40B and later."""
    return fields.flag("new_decoder_architecture", False)


def _n_head_kv(fields: Fields, n_head: int) -> int:
    if not _is_new(fields):
        return 1 if fields.flag("multi_query", True) else n_head
    n_head_kv = fields.integer("num_kv_heads", n_head)
    if n_head % n_head_kv:
        raise fields.error("num_kv_heads", f"a divisor of {n_head}", n_head_kv)
    return n_head_kv


def _norms(fields: Fields) -> tuple[str, str]:
    """The names of the norms before attention and before the FFN; beside each other, both may read one."""
    if not fields.flag("parallel_attn", True):
        if _is_new(fields):
            raise fields.unsupported("parallel_attn", "true in the new decoder architecture")
        return "input_layernorm", "post_attention_layernorm"
    n = fields.integer("num_ln_in_parallel_attn", 2 if _is_new(fields) else 1, high=2)
    if n == 2 and not _is_new(fields):
        raise fields.unsupported("num_ln_in_parallel_attn", "1 in the old decoder architecture")
    return ("ln_attn", "ln_mlp") if n == 2 else ("input_layernorm", "input_layernorm")


def _rows_of_qkv(config: Config, theirs: str, shape: tuple[int, ...], index: Index) -> Source:
    """A matrix or bias of this shape that is rows of the one for q, k and v."""
    n_heads = config.n_head + 2 * config.n_head_kv
    return picked(theirs, (n_heads * config.head_dim, *shape[1:]), shape[0], index)


def _grouped(config: Config, part: str) -> Index:
    """Its rows in a folder: after the query heads that share a key head come that and its value head."""
    n_q = config.n_head // config.n_head_kv  # of a group
    first, n = {"attn_q": (0, n_q), "attn_k": (n_q, 1), "attn_v": (n_q + 1, 1)}[part]

    def index(rows: Rows) -> Rows:
        head, row = np.divmod(rows, config.head_dim)
        group, head = np.divmod(head, n)
        return (group * (n_q + 2) + first + head) * config.head_dim + row

    return index


def _in_order(config: Config, part: str) -> Index:
    """Its rows in GGUF: all query heads, all key heads, all value heads."""
    heads = {"attn_q": 0, "attn_k": config.n_head, "attn_v": config.n_head + config.n_head_kv}[part]
    return lambda rows: rows + heads * config.head_dim


def _gguf(header: Header) -> Reading:
    """llama.cpp knows the parallel kind only, without biases; its attn_norm is the FFN's, and attention's where that
    has no attn_norm_2.
    """
    header.keys.choice("tensor_data_layout", ("jploski",))
    config = replace(read_gguf_config(header, "falcon", "gelu", gated=False, norm="layer"), parallel=True)
    sources = gguf_sources(header, config)
    for ours, source in sources.items():
        part = ours.split(".")[-2]
        if part in QKV:
            sources[ours] = _rows_of_qkv(config, ours.replace(part, "attn_qkv"), source.shape, _in_order(config, part))
        if part == "ffn_norm":
            sources[ours] = stored(ours.replace(part, "attn_norm"), source.shape)
        if part == "attn_norm" and ours.replace(part, "attn_norm_2").replace("bias", "weight") in header.file.tensors:
            sources[ours] = stored(ours.replace(part, "attn_norm_2"), source.shape)
    return Reading(config, sources)


FAMILY = Family(
    name="falcon",
    models={"falcon": "FalconForCausalLM"},
    folder=_folder,
    gguf={"falcon": _gguf},
    pwri=Pwri(_gguf, "relu", {"tokenizer.ggml.pre": "falcon"}),
    activations=("relu",),
    example="SparseLLM/ReluFalcon-40B",
    checked="transformers: 7B, 40B, 11B, parallel or not",
)
