"""config.json: what the model is. Every field that changes what the families compute is checked, none is guessed."""

from powerinfer_tools.checkpoint.config import Config
from powerinfer_tools.checkpoint.fields import Fields
from powerinfer_tools.checkpoint.rope import rope_from_config
from powerinfer_tools.checkpoint.tensors import ATTENTION

MODEL_TYPES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "opt": "OPT"}
HIDDEN_ACTS = {
    "relu": "relu",
    "relu2": "relu2",
    "relu_squared": "relu2",
    "fatrelu": "fatrelu",
    "drelu": "drelu",
    "silu": "silu",
    "swish": "silu",
    "silu_cut": "silu",
}
THRESHOLDS = "hidden_act_thresholds"  # our own field, one number a layer
THRESHOLD_ACTS = ("silu_cut", "fatrelu", "drelu")  # none that other programs know and would compute without a cut
OPT_NORM_EPS = 1e-5  # the family's constant: config.json does not record it
QKV = ATTENTION[:3]
FFN = ("ffn_gate", "ffn_up", "ffn_down")


def read_config(fields: Fields, name: str, notes: list[str]) -> tuple[Config, tuple[str, ...]]:
    """The configuration, and the parts of a layer that have biases; adds to notes what a user should know.

    Errors: an unknown model_type, activation or variant, named with those that are known; a size out of range.
    """
    kind = fields.text("model_type")
    if kind not in MODEL_TYPES:
        raise fields.unsupported("model_type", f"one of {', '.join(MODEL_TYPES)}")
    architecture = f"{MODEL_TYPES[kind]}ForCausalLM"
    if fields.values.get("architectures", [architecture]) not in ([architecture], None):
        raise fields.unsupported("architectures", f"[{architecture!r}]")
    if "quantization_config" in fields:
        raise fields.unsupported("quantization_config", "float weights without it")
    return _opt(fields, name) if kind == "opt" else _llama(fields, name, kind, notes)


def _llama(fields: Fields, name: str, kind: str, notes: list[str]) -> tuple[Config, tuple[str, ...]]:
    n_embd, n_head = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    n_head_kv = fields.integer("num_key_value_heads", n_head)
    if n_head % n_head_kv:
        raise fields.error("num_key_value_heads", f"a divisor of {n_head}", n_head_kv)
    if "head_dim" not in fields and n_embd % n_head:
        raise fields.error("num_attention_heads", f"a divisor of hidden_size {n_embd}", n_head)
    head_dim = fields.integer("head_dim", n_embd // n_head, low=2)
    if head_dim % 2:
        raise fields.error("head_dim", "an even number", head_dim)
    n_ctx = _window(fields, kind, fields.integer("max_position_embeddings"), notes)
    n_layer = fields.integer("num_hidden_layers", high=4096)
    activation, thresholds = _activation(fields, n_layer)
    config = Config(
        arch="llama",
        name=name,
        n_layer=n_layer,
        n_embd=n_embd,
        n_ff=fields.integer("intermediate_size"),
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        n_vocab=fields.integer("vocab_size"),
        n_ctx=n_ctx,
        norm_eps=fields.number("rms_norm_eps", high=1.0),
        activation=activation,
        gated=True,
        tied=fields.flag("tie_word_embeddings", False),
        rope=rope_from_config(fields, head_dim, fields.integer("max_position_embeddings")),
        thresholds=thresholds,
    )
    return config, _llama_biases(fields, kind)


def _llama_biases(fields: Fields, kind: str) -> tuple[str, ...]:
    if kind == "qwen2":
        return QKV
    if kind == "mistral":
        return ()
    attention = ATTENTION if fields.flag("attention_bias", False) else ()
    return attention + (FFN if fields.flag("mlp_bias", False) else ())


def _window(fields: Fields, kind: str, n_ctx: int, notes: list[str]) -> int:
    """The context within which sliding-window attention sees everything, so that it is plain attention."""
    slides = {"llama": False, "mistral": True, "qwen2": fields.flag("use_sliding_window", False)}[kind]
    if not slides or fields.values.get("sliding_window", 4096) is None:
        return n_ctx
    window = fields.integer("sliding_window", 4096)  # the default of both families
    if window < n_ctx:
        notes.append(f"context limited to {window} positions, the sliding window of its attention")
    return min(n_ctx, window)


def _activation(fields: Fields, n_layer: int) -> tuple[str, tuple[float, ...]]:
    """The activation and its threshold a layer: hidden_act_thresholds, as `powerinfer sparsify` writes them, or
    fatrelu's one number (hidden_act_param, as MiniCPM-S and ProSparse write it).
    """
    name = fields.text("hidden_act")
    activation = HIDDEN_ACTS.get(name)
    if activation is None:
        raise fields.unsupported("hidden_act", f"one of {', '.join(HIDDEN_ACTS)}")
    if THRESHOLDS in fields or name == "silu_cut":
        if name not in THRESHOLD_ACTS:
            raise fields.unsupported("hidden_act", f"one of {', '.join(THRESHOLD_ACTS)} beside {THRESHOLDS}")
        return activation, _thresholds(fields, n_layer)
    return activation, (fields.number("hidden_act_param") if activation == "fatrelu" else 0.0,) * n_layer


def _thresholds(fields: Fields, n_layer: int) -> tuple[float, ...]:
    values = fields.values.get(THRESHOLDS)
    numbers = isinstance(values, list) and all(type(t) in (int, float) and 0 <= t < 1e6 for t in values)
    if not isinstance(values, list) or not numbers or len(values) != n_layer:
        raise fields.error(THRESHOLDS, f"{n_layer} numbers, not negative", values)
    return tuple(float(t) for t in values)


def _opt(fields: Fields, name: str) -> tuple[Config, tuple[str, ...]]:
    n_embd, n_head = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if n_embd % n_head:
        raise fields.error("num_attention_heads", f"a divisor of hidden_size {n_embd}", n_head)
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
    n_layer = fields.integer("num_hidden_layers", high=4096)
    config = Config(
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
        norm_eps=OPT_NORM_EPS,
        activation="relu",
        gated=False,
        tied=fields.flag("tie_word_embeddings", True),
        rope=None,
        thresholds=(0.0,) * n_layer,
        norm="layer",
        learned_positions=True,
    )
    return config, (*ATTENTION, *FFN[1:]) if fields.flag("enable_bias", True) else ()
