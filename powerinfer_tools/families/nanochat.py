"""nanochat: norms without weights, queries and keys normalised after rotation, relu squared, capped logits.

After transformers' nanochat. Its embedding is normalised before the first layer: here as its rows are read. It rotates
the other way round: here by negative frequencies. No architecture of llama.cpp.
"""

from dataclasses import replace

import numpy as np

from powerinfer_tools.checkpoint.config import Config
from powerinfer_tools.checkpoint.fields import Fields
from powerinfer_tools.checkpoint.huggingface_config import name_sources, read_biases
from powerinfer_tools.checkpoint.source import FloatArray
from powerinfer_tools.checkpoint.sources import Reading, Source, folded
from powerinfer_tools.families.family import Family
from powerinfer_tools.families.llama import NAMES as LLAMA
from powerinfer_tools.families.llama import read_llama_config

NAMES = LLAMA | {"ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"}
CAP = "final_logit_softcapping"
DEFAULT_CAP = 15.0


def _folder(fields: Fields, name: str, notes: list[str]) -> Reading:
    if fields.flag("tie_word_embeddings", False):
        raise fields.unsupported("tie_word_embeddings", "false: the embedding is normalised, the output matrix not")
    config = _config(fields, name)
    sources = name_sources(config, read_biases(fields), NAMES)
    for ours in sources:
        if ours.endswith("_norm.weight"):
            sources[ours] = Source((config.n_embd,), {}, lambda read, rows: np.ones(len(rows), np.float32))
    embedding = "token_embd.weight"
    sources[embedding] = folded(sources[embedding], lambda rows: _normalised(rows, config.norm_eps))
    return Reading(config, sources)


def _config(fields: Fields, name: str) -> Config:
    config = read_llama_config(fields, name)
    assert config.rope is not None
    return replace(
        config,
        arch="nanochat",
        gated=False,
        rope=replace(config.rope, inv_freq=-config.rope.inv_freq),
        qk_norm=True,
        softcap=0.0 if fields.values.get(CAP, DEFAULT_CAP) is None else fields.number(CAP, DEFAULT_CAP),
    )


def _normalised(rows: FloatArray, eps: float) -> FloatArray:
    scale: FloatArray = 1 / np.sqrt(np.square(rows).mean(axis=1, keepdims=True) + np.float32(eps))
    return rows * scale


FAMILY = Family(
    name="nanochat",
    models={"nanochat": "NanoChatForCausalLM"},
    folder=_folder,
    activations=("relu2",),
    example="karpathy/nanochat-d32",
    checked="transformers",
)
