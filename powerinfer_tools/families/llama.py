"""LLaMA, Mistral and Qwen2; ReluLLaMA and ProSparse are LLaMAs with another activation."""

from dataclasses import replace

from powerinfer_tools.checkpoint.config import Config
from powerinfer_tools.checkpoint.fields import Fields
from powerinfer_tools.checkpoint.gguf_config import Header, gguf_sources, interleaved, read_gguf_config
from powerinfer_tools.checkpoint.huggingface_config import (
    name_sources,
    read_activation,
    read_biases,
    read_heads,
    read_layers,
)
from powerinfer_tools.checkpoint.rope import rope_from_config
from powerinfer_tools.checkpoint.sources import Reading
from powerinfer_tools.checkpoint.tensors import ATTENTION
from powerinfer_tools.families.family import Family

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "layer": "model.layers",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def read_llama_config(fields: Fields, name: str) -> Config:
    """The structure that LLaMA gave to all its kin."""
    heads, n_layer = read_heads(fields), read_layers(fields)
    n_ctx = fields.integer("max_position_embeddings")
    activation, thresholds = read_activation(fields, n_layer)
    return Config(
        arch="llama",
        name=name,
        n_layer=n_layer,
        n_embd=heads.n_embd,
        n_ff=fields.integer("intermediate_size"),
        n_head=heads.n_head,
        n_head_kv=heads.n_head_kv,
        head_dim=heads.head_dim,
        n_vocab=fields.integer("vocab_size"),
        n_ctx=n_ctx,
        norm_eps=fields.number("rms_norm_eps", high=1.0),
        activation=activation,
        gated=True,
        tied=fields.flag("tie_word_embeddings", False),
        rope=rope_from_config(fields, heads.head_dim, n_ctx),
        thresholds=thresholds,
    )


def _folder(fields: Fields, name: str, notes: list[str]) -> Reading:
    kind = fields.text("model_type")
    config = read_llama_config(fields, name)
    config = replace(config, n_ctx=_window(fields, kind, config.n_ctx, notes))
    biased = {"qwen2": ATTENTION[:3], "mistral": ()}.get(kind)
    return Reading(config, name_sources(config, read_biases(fields) if biased is None else biased, NAMES))


def _window(fields: Fields, kind: str, n_ctx: int, notes: list[str]) -> int:
    """The context within which sliding-window attention sees everything, so that it is plain attention."""
    slides = {"llama": False, "mistral": True, "qwen2": fields.flag("use_sliding_window", False)}[kind]
    if not slides or fields.values.get("sliding_window", 4096) is None:
        return n_ctx
    window = fields.integer("sliding_window", 4096)  # the default of both families
    if window < n_ctx:
        notes.append(f"context limited to {window} positions, the sliding window of its attention")
    return min(n_ctx, window)


def _gguf(header: Header) -> Reading:
    config = read_gguf_config(header, "llama", "silu")
    return Reading(config, interleaved(gguf_sources(header, config), config.head_dim))


FAMILY = Family(
    name="llama",
    models={"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"},
    folder=_folder,
    gguf={"llama": _gguf},
)
