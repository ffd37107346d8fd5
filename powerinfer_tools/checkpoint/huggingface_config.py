"""What the families' config.json have in common. Every field that changes what is computed is checked, none guessed."""

from collections.abc import Mapping

from powerinfer_tools.checkpoint.config import Config
from powerinfer_tools.checkpoint.fields import Fields
from powerinfer_tools.checkpoint.rope import rope_from_config
from powerinfer_tools.checkpoint.sources import Source, stored
from powerinfer_tools.checkpoint.tensors import ATTENTION, FFN, bias_shapes, required_shapes

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
MAX_LAYERS = 4096


def read_plain_config(
    fields: Fields,
    arch: str,
    name: str,
    *,
    norm_eps: str = "rms_norm_eps",
    gated: bool = True,
    partial_rotary: float | None = None,
    rope_theta: float = 10000.0,
) -> Config:
    """The sizes and choices of a plain model, under the names that LLaMA gave them.

    norm_eps: the field's name; partial_rotary: the share of a head that rotates where no field says, None: all of it;
    rope_theta: what it is where no field says.
    Errors: sizes that do not go together; what no family computes.
    """
    n_embd, n_head = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    n_head_kv = fields.integer("num_key_value_heads", n_head)
    if n_head % n_head_kv:
        raise fields.error("num_key_value_heads", f"a divisor of {n_head}", n_head_kv)
    head_dim = read_head_dim(fields, n_embd, n_head)
    n_layer = fields.integer("num_hidden_layers", high=MAX_LAYERS)
    n_ctx = fields.integer("max_position_embeddings")
    activation, thresholds = read_activation(fields, n_layer, gated)
    return Config(
        arch=arch,
        name=name,
        n_layer=n_layer,
        n_embd=n_embd,
        n_ff=fields.integer("intermediate_size"),
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        n_vocab=fields.integer("vocab_size"),
        n_ctx=n_ctx,
        norm_eps=fields.number(norm_eps, high=1.0),
        activation=activation,
        gated=gated,
        tied=fields.flag("tie_word_embeddings", False),
        rope=rope_from_config(fields, head_dim, n_ctx, partial_rotary, rope_theta),
        thresholds=thresholds,
    )


def read_head_dim(fields: Fields, n_embd: int, n_head: int) -> int:
    """The size of a head. Errors: odd, or left open by sizes that do not go together."""
    if "head_dim" not in fields and n_embd % n_head:
        raise fields.error("num_attention_heads", f"a divisor of hidden_size {n_embd}", n_head)
    head_dim = fields.integer("head_dim", n_embd // n_head, low=2)
    if head_dim % 2:
        raise fields.error("head_dim", "an even number", head_dim)
    return head_dim


def read_activation(
    fields: Fields, n_layer: int, gated: bool, key: str = "hidden_act"
) -> tuple[str, tuple[float, ...]]:
    """The activation and its threshold a layer: hidden_act_thresholds, as `powerinfer sparsify` writes them, or
    fatrelu's one number (hidden_act_param, as MiniCPM-S and ProSparse write it). drelu is of gated FFNs only.
    """
    name = fields.choice(key, [name for name in HIDDEN_ACTS if gated or name != "drelu"])
    activation = HIDDEN_ACTS[name]
    if THRESHOLDS in fields or name == "silu_cut":
        if name not in THRESHOLD_ACTS:
            raise fields.unsupported(key, f"one of {', '.join(THRESHOLD_ACTS)} beside {THRESHOLDS}")
        return activation, _thresholds(fields, n_layer)
    return activation, (fields.number("hidden_act_param") if activation == "fatrelu" else 0.0,) * n_layer


def _thresholds(fields: Fields, n_layer: int) -> tuple[float, ...]:
    values = fields.get(THRESHOLDS)
    numbers = isinstance(values, list) and all(type(t) in (int, float) and 0 <= t < 1e6 for t in values)
    if not isinstance(values, list) or not numbers or len(values) != n_layer:
        raise fields.error(THRESHOLDS, f"{n_layer} numbers, not negative", values)
    return tuple(float(t) for t in values)


def read_biases(fields: Fields) -> tuple[str, ...]:
    """The matrices that have biases, by attention_bias and mlp_bias."""
    attention = ATTENTION if fields.flag("attention_bias", False) else ()
    return attention + (FFN if fields.flag("mlp_bias", False) else ())


def name_sources(config: Config, biased: tuple[str, ...], names: Mapping[str, str]) -> dict[str, Source]:
    """Each of our tensors, as it is stored under the name that `names` gives its part."""
    shapes = required_shapes(config) | bias_shapes(config, biased)
    return {name: stored(their_name(names, name), shape) for name, shape in shapes.items()}


def their_name(names: Mapping[str, str], name: str) -> str:
    """The Hugging Face name of our tensor `name`; names: theirs of each part, "layer" what all layers begin with."""
    if not name.startswith("blk."):
        part, end = name.rsplit(".", 1)
        return f"{names[part]}.{end}"
    _, i, part, end = name.split(".")
    return f"{names['layer']}.{i}.{names[part]}.{end}"
