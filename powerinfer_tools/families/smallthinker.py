"""SmallThinker: ReLU experts whose router sees the stream before attention; some layers do not rotate, others slide.

After PowerInfer/SmallThinker-4BA0.6B-Instruct, modeling_smallthinker.py, and llama.cpp's graph of the same name.
"""

from dataclasses import replace

from powerinfer_tools.checkpoint.config import Config
from powerinfer_tools.checkpoint.experts import GGUF_KEYS, expert_sources, gguf_expert_sources, with_experts
from powerinfer_tools.checkpoint.fields import Fields
from powerinfer_tools.checkpoint.gguf_config import Header, read_gguf_config
from powerinfer_tools.checkpoint.huggingface_config import name_sources, read_plain_config
from powerinfer_tools.checkpoint.sources import Reading
from powerinfer_tools.families.family import Family
from powerinfer_tools.families.llama import NAMES, read_window

COUNTS = ("moe_num_primary_experts", "moe_num_active_primary_experts")
MOE = "block_sparse_moe"
MATRICES = {
    part: f"model.layers.{{i}}.{MOE}.experts.{{e}}.{name}.weight"
    for part, name in {"ffn_gate": "gate", "ffn_up": "up", "ffn_down": "down"}.items()
}
GATINGS = {1: "softmax", 2: "sigmoid"}  # llama.cpp's numbers
STILL_EVERY = 4  # of layers that slide, in GGUF: layers 0, 4, 8 .. neither slide nor rotate


def _folder(fields: Fields, name: str, notes: list[str]) -> Reading:
    said = {
        "intermediate_size": fields.integer("moe_ffn_hidden_size"),
        "hidden_act": "relu",
        "tie_word_embeddings": fields.flag("tie_word_embeddings", True),
    }
    config = read_plain_config(Fields(fields.where, {**fields.values, **said}), "smallthinker", name, rope_theta=1e6)
    config = _rotating(config, _layout(fields, "rope_layout", config.n_layer, default=1))
    if any(_layout(fields, "sliding_window_layout", config.n_layer, default=0)):
        config = replace(config, n_ctx=read_window(fields, config.n_ctx, notes, "sliding_window_size"))
    gating = "softmax" if fields.flag("moe_primary_router_apply_softmax", False) else "sigmoid"
    routed_by = "layer_input" if fields.flag("moe_enable_early_router", True) else "ffn_input"
    config = with_experts(config, fields, COUNTS, gating, routed_by)
    names = {**NAMES, "ffn_router": f"{MOE}.primary_router"}
    return Reading(config, name_sources(config, (), names) | expert_sources(config, MATRICES))


def _layout(fields: Fields, key: str, n_layer: int, default: int) -> tuple[bool, ...]:
    """A list of 0 or 1, one for each layer."""
    values = fields.get(key, [default] * n_layer)
    if not isinstance(values, list) or len(values) != n_layer or any(value not in (0, 1) for value in values):
        raise fields.error(key, f"{n_layer} times 0 or 1", values)
    return tuple(map(bool, values))


def _rotating(config: Config, rotary: tuple[bool, ...]) -> Config:
    """The config of a model of which these layers rotate."""
    if not any(rotary):
        return replace(config, rope=None)
    return config if all(rotary) else replace(config, rotary=rotary)


def _gguf(header: Header) -> Reading:
    keys = header.keys
    known = frozenset(("expert_feed_forward_length", "expert_gating_func", "attention.sliding_window"))
    config = read_gguf_config(header, "smallthinker", "relu", known=known, experts=True)
    if "expert_feed_forward_length" in keys:
        config = replace(config, n_ff=keys.integer("expert_feed_forward_length"))
    if keys.get("attention.sliding_window", 0) != 0:
        config = replace(config, n_ctx=read_window(keys, config.n_ctx, header.notes, "attention.sliding_window"))
        config = _rotating(config, tuple(i % STILL_EVERY != 0 for i in range(config.n_layer)))
    gating = keys.integer("expert_gating_func", 2)
    if gating not in GATINGS:
        raise keys.unsupported("expert_gating_func", "1, softmax, or 2, sigmoid")
    config = with_experts(config, keys, GGUF_KEYS, GATINGS[gating], "layer_input")
    return Reading(config, gguf_expert_sources(header, config))


FAMILY = Family(
    name="smallthinker",
    models={"smallthinker": "SmallThinkerForCausalLM"},
    folder=_folder,
    gguf={"smallthinker": _gguf},
    activations=("relu",),
    example="PowerInfer/SmallThinker-4BA0.6B-Instruct, PowerInfer/SmallThinker-21BA3B-Instruct",
    checked="its published code, written anew in the test",
)
