"""MiniCPM, whose MiniCPM-S is sparse: LLaMA with fatrelu, and three scales, folded into the weights.

After openbmb/MiniCPM-S-1B-sft's config.json (which has no model_type) and modeling_minicpm.py. llama.cpp's `minicpm`
has the scales as keys and q and k rows interleaved, as its `llama` has; its graph computes silu, whatever the model.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from powerinfer_tools.checkpoint.config import Config
from powerinfer_tools.checkpoint.fields import Fields
from powerinfer_tools.checkpoint.gguf_config import Header, gguf_sources, interleaved, read_gguf_config
from powerinfer_tools.checkpoint.huggingface_config import name_sources, read_biases
from powerinfer_tools.checkpoint.sources import Reading, Source, folded
from powerinfer_tools.families.family import Family
from powerinfer_tools.families.llama import NAMES, read_llama_config

KEYS = frozenset(("embedding_scale", "residual_scale", "logit_scale"))


def _folder(fields: Fields, name: str, notes: list[str]) -> Reading:
    config = replace(read_llama_config(fields, name), arch="minicpm", tied=fields.flag("tie_word_embeddings", True))
    if fields.get("num_experts", 0) != 0:
        raise fields.unsupported("num_experts", "0, no experts")
    residual = fields.number("scale_depth") / config.n_layer**0.5
    head = config.n_embd / fields.number("dim_model_base")
    sources = name_sources(config, read_biases(fields), NAMES)
    return Reading(config, _scaled(config, sources, fields.number("scale_emb"), residual, head))


def _gguf(header: Header) -> Reading:
    config = read_gguf_config(header, "minicpm", "silu", known=KEYS)
    sources = interleaved(gguf_sources(header, config), config.head_dim)
    scales = (header.keys.number(key) for key in ("embedding_scale", "residual_scale", "logit_scale"))
    return Reading(config, _scaled(config, sources, *scales))


def _scaled(
    config: Config, sources: Mapping[str, Source], embedding: float, residual: float, head: float
) -> dict[str, Source]:
    """The stream begins with embedding times a row; each branch is multiplied by residual before it is added; the
    output matrix sees the normalised stream divided by head. A tied one has been multiplied by embedding, too.
    """
    scales = {
        "token_embd": embedding,
        "attn_output": residual,
        "ffn_down": residual,
        "output_norm": 1 / (head * (embedding if config.tied else 1.0)),
    }

    def source(name: str, plain: Source) -> Source:
        scale = scales.get(name.split(".")[-2])
        return plain if scale is None else folded(plain, lambda rows: rows * np.float32(scale))

    return {name: source(name, plain) for name, plain in sources.items()}


FAMILY = Family(
    name="minicpm",
    models={"minicpm": "MiniCPMForCausalLM"},
    folder=_folder,
    gguf={"minicpm": _gguf},
    activations=("fatrelu", "silu"),
    example="openbmb/MiniCPM-S-1B-sft",
    checked="its published code, written anew in the test",
)
