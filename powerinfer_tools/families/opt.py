"""OPT: LayerNorm, learned positions, a plain FFN with ReLU."""

from dataclasses import replace

from powerinfer_tools.checkpoint.config import Config
from powerinfer_tools.checkpoint.fields import Fields
from powerinfer_tools.checkpoint.gguf_config import Header, gguf_sources, read_gguf_config
from powerinfer_tools.checkpoint.huggingface_config import MAX_LAYERS, name_sources, their_name
from powerinfer_tools.checkpoint.sources import Reading, picked
from powerinfer_tools.checkpoint.tensors import ATTENTION, FFN
from powerinfer_tools.families.family import Family, Pwri

NORM_EPS = 1e-5  # config.json does not record it
OFFSET = 2  # position p lies in row p + 2
NAMES = {
    "token_embd": "model.decoder.embed_tokens",
    "position_embd": "model.decoder.embed_positions",
    "output_norm": "model.decoder.final_layer_norm",
    "output": "lm_head",
    "layer": "model.decoder.layers",
    "attn_norm": "self_attn_layer_norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.out_proj",
    "ffn_norm": "final_layer_norm",
    "ffn_up": "fc1",
    "ffn_down": "fc2",
}


def _folder(fields: Fields, name: str, notes: list[str]) -> Reading:
    config = _config(fields, name)
    sources = name_sources(config, (*ATTENTION, *FFN) if fields.flag("enable_bias", True) else (), NAMES)
    ours, shape = "position_embd.weight", (config.n_ctx + OFFSET, config.n_embd)
    sources[ours] = picked(their_name(NAMES, ours), shape, config.n_ctx, lambda rows: rows + OFFSET)
    return Reading(config, sources)


def _config(fields: Fields, name: str) -> Config:
    n_embd, n_head = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if n_embd % n_head:
        raise fields.error("num_attention_heads", f"a divisor of hidden_size {n_embd}", n_head)
    _check_variant(fields, n_embd)
    n_layer = fields.integer("num_hidden_layers", high=MAX_LAYERS)
    return Config(
        arch="opt",
        name=name,
        n_layer=n_layer,
        n_embd=n_embd,
        n_ff=fields.integer("ffn_dim"),
        n_head=n_head,
        n_head_kv=n_head,
        head_dim=n_embd // n_head,
        n_vocab=fields.integer("vocab_size"),
        n_ctx=fields.integer("max_position_embeddings"),
        norm_eps=NORM_EPS,
        activation="relu",
        gated=False,
        tied=fields.flag("tie_word_embeddings", True),
        rope=None,
        thresholds=(0.0,) * n_layer,
        norm="layer",
        learned_positions=True,
    )


def _check_variant(fields: Fields, n_embd: int) -> None:
    for key, needed in (
        ("do_layer_norm_before", True),
        ("layer_norm_elementwise_affine", True),
        ("_remove_final_layer_norm", False),
    ):
        if fields.flag(key, needed) != needed:
            raise fields.unsupported(key, str(needed).lower())
    if fields.integer("word_embed_proj_dim", n_embd) != n_embd:
        raise fields.unsupported("word_embed_proj_dim", f"hidden_size {n_embd}, no projection")
    if fields.text("activation_function", "relu") != "relu":
        raise fields.unsupported("activation_function", "relu")


def _pwri(header: Header) -> Reading:
    """The first PowerInfer counts the rows before position 0 as context; llama.cpp has no OPT."""
    plain = read_gguf_config(header, "opt", "relu", gated=False, norm="layer")
    n_rows = plain.n_ctx
    config = replace(plain, n_ctx=n_rows - OFFSET, rope=None, learned_positions=True)
    sources, ours = gguf_sources(header, config), "position_embd.weight"
    sources[ours] = picked(ours, (n_rows, config.n_embd), config.n_ctx, lambda rows: rows + OFFSET)
    return Reading(config, sources)


FAMILY = Family(
    name="opt",
    models={"opt": "OPTForCausalLM"},
    folder=_folder,
    pwri=Pwri(_pwri, "relu", {"opt.attention.layer_norm_epsilon": 1e-5}),
    activations=("relu",),
    example="facebook/opt-6.7b",
    checked="transformers",
)
