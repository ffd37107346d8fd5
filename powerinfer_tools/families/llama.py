"""LLaMA, Mistral and Qwen2; ReluLLaMA and ProSparse are LLaMAs with another activation.

SparseLLM/prosparse-llama-2-7b comes with modeling_sparsellama.py: a model_type and class of its own, LLaMA's names.
"""

from dataclasses import replace

from powerinfer_tools.checkpoint.config import Config
from powerinfer_tools.checkpoint.experts import GGUF_KEYS, gguf_expert_sources, with_experts
from powerinfer_tools.checkpoint.fields import Fields
from powerinfer_tools.checkpoint.gguf_config import Header, gguf_sources, interleaved, read_gguf_config
from powerinfer_tools.checkpoint.huggingface_config import name_sources, read_biases, read_plain_config
from powerinfer_tools.checkpoint.sources import Reading
from powerinfer_tools.checkpoint.tensors import ATTENTION
from powerinfer_tools.families.family import Family, Pwri

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
    """What LLaMA and those that changed little of it compute."""
    return read_plain_config(fields, "llama", name)


def _folder(fields: Fields, name: str, notes: list[str]) -> Reading:
    kind = fields.text("model_type")
    config = read_llama_config(fields, name)
    slides = {"mistral": True, "qwen2": fields.flag("use_sliding_window", False)}.get(kind, False)
    config = replace(config, n_ctx=read_window(fields, config.n_ctx, notes)) if slides else config
    biased = {"qwen2": ATTENTION[:3], "mistral": ()}.get(kind)
    return Reading(config, name_sources(config, read_biases(fields) if biased is None else biased, NAMES))


def read_window(fields: Fields, n_ctx: int, notes: list[str], key: str = "sliding_window") -> int:
    """The context within which sliding-window attention sees everything, so that it is plain attention."""
    if fields.values.get(fields.prefix + key, 4096) is None:
        return n_ctx
    window = fields.integer(key, 4096)  # the default of all families that have it
    if window < n_ctx:
        notes.append(f"context limited to {window} positions, the sliding window of its attention")
    return min(n_ctx, window)


def _llama_gguf(header: Header) -> Reading:
    config = read_gguf_config(header, "llama", "silu", experts=True)
    sources = gguf_sources(header, config)
    if header.keys.get("expert_count", 0) != 0:
        config = with_experts(replace(config, arch="mixtral"), header.keys, GGUF_KEYS, "softmax", "ffn_input")
        sources = gguf_expert_sources(header, config)
    return Reading(config, interleaved(sources, config.head_dim))


def _qwen2_gguf(header: Header) -> Reading:
    config = read_gguf_config(header, "llama", "silu")
    return Reading(config, gguf_sources(header, config))


FAMILY = Family(
    name="llama",
    models={
        "llama": "LlamaForCausalLM",
        "sparsellama": "SparseLlamaForCausalLM",
        "mistral": "MistralForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
    },
    folder=_folder,
    gguf={"llama": _llama_gguf, "qwen2": _qwen2_gguf},
    pwri=Pwri(_llama_gguf, "relu"),
    activations=("silu", "relu", "relu2", "fatrelu", "drelu"),
    example="SparseLLM/ReluLLaMA-7B, SparseLLM/prosparse-llama-2-7b",
    checked="transformers: llama, mistral, qwen2",
)
