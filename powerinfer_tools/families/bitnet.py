"""BitNet b1.58: LLaMA with relu squared and a norm before the output matrix and before down, folded into their columns.

After transformers' bitnet and microsoft/bitnet-b1.58-2B-4T, whose releases are packed (offline: four ternary rows in a
row of bytes, and a scale) or bf16 (online: master weights, made ternary where they are used); both read as ternary
weights in float. That model rounds what each matrix reads to 8 bits; here nothing is rounded. llama.cpp's `bitnet` ties
the output, does not permute q and k, and computes silu unless hidden_activation says otherwise: right for the models
that its conversion reads, wrong for 2B-4T. Without that key it is asked for here.
"""

from dataclasses import replace

import numpy as np

from powerinfer_tools.checkpoint.fields import Fields
from powerinfer_tools.checkpoint.gguf_config import Header, gguf_sources, read_gguf_config
from powerinfer_tools.checkpoint.huggingface_config import name_sources, read_biases, read_plain_config, their_name
from powerinfer_tools.checkpoint.sources import Reading, Source
from powerinfer_tools.checkpoint.ternary import made_ternary, packed
from powerinfer_tools.families.family import Family
from powerinfer_tools.families.llama import NAMES

NOTE = "BitNet rounds what its matrices read to 8 bits; here nothing is rounded"


def _folder(fields: Fields, name: str, notes: list[str]) -> Reading:
    config = replace(read_plain_config(fields, "bitnet", name, rope_theta=5e5), sub_norms=True)
    sources, mode = name_sources(config, read_biases(fields), NAMES), _mode(fields)
    matrices = {ours: theirs for ours, theirs in sources.items() if ours.startswith("blk.") and len(theirs.shape) == 2}
    if mode == "online":
        sources |= {ours: made_ternary(theirs) for ours, theirs in matrices.items()}
    elif mode == "offline":
        sources |= {ours: packed(their_name(NAMES, ours), theirs.shape) for ours, theirs in matrices.items()}
    if mode is not None:
        notes.append(NOTE)
    for i in range(config.n_layer):
        _fold(sources, f"blk.{i}.attn_output", f"model.layers.{i}.self_attn.attn_sub_norm")
        _fold(sources, f"blk.{i}.ffn_down", f"model.layers.{i}.mlp.ffn_sub_norm")
    return Reading(config, sources, packed=frozenset(their_name(NAMES, ours) for ours in matrices if mode == "offline"))


def _mode(fields: Fields) -> str | None:
    """How the matrices become ternary: offline, before they were stored; online, when they are used; None: not."""
    values = fields.get("quantization_config")
    if values is None:
        return None
    if not isinstance(values, dict):
        raise fields.error("quantization_config", "an object", values)
    how = Fields(f"{fields.where}: quantization_config", values)
    how.choice("quant_method", ("bitnet",))
    how.choice("linear_class", ("autobitlinear",))
    for key in ("use_rms_norm", "modules_to_not_convert"):
        if how.get(key):
            raise how.unsupported(key, "none")
    return how.choice("quantization_mode", ("online", "offline"))


def _fold(sources: dict[str, Source], matrix: str, norm: str) -> None:
    """Multiplies the columns of the matrix by the weights of the norm before it."""
    plain, norm = sources[f"{matrix}.weight"], f"{norm}.weight"
    n = plain.shape[1]
    sources[f"{matrix}.weight"] = Source(
        plain.shape,
        plain.needs | {norm: (n,)},
        lambda read, rows: plain.read(read, rows) * read(norm, np.arange(n)),
    )


def _gguf(header: Header) -> Reading:
    config = replace(read_gguf_config(header, "bitnet", "silu or relu2"), sub_norms=True)
    sources = gguf_sources(header, config)
    for i in range(config.n_layer):
        _fold(sources, f"blk.{i}.attn_output", f"blk.{i}.attn_sub_norm")
        _fold(sources, f"blk.{i}.ffn_down", f"blk.{i}.ffn_sub_norm")
    return Reading(config, sources)


FAMILY = Family(
    name="bitnet",
    models={"bitnet": "BitNetForCausalLM"},
    folder=_folder,
    gguf={"bitnet": _gguf},
    quantised=True,
    activations=("relu2",),
    example="microsoft/bitnet-b1.58-2B-4T",
    checked="transformers, in float: plain, master and packed weights",
)
