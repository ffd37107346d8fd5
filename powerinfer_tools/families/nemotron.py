"""Nemotron and Minitron: LayerNorm with weights around 0, half of each head rotated, a plain FFN with squared ReLU."""

from dataclasses import replace

from powerinfer_tools.checkpoint.fields import Fields
from powerinfer_tools.checkpoint.gguf_config import NORM_EPS, Header, gguf_sources, read_gguf_config
from powerinfer_tools.checkpoint.huggingface_config import name_sources, read_biases, read_plain_config
from powerinfer_tools.checkpoint.sources import Reading, Source, folded
from powerinfer_tools.families.family import Family
from powerinfer_tools.families.llama import NAMES

ROTARY_SHARE = 0.5  # of each head, where config.json does not say


def _folder(fields: Fields, name: str, notes: list[str]) -> Reading:
    config = read_plain_config(fields, "nemotron", name, norm_eps="norm_eps", gated=False, partial_rotary=ROTARY_SHARE)
    config = replace(config, norm="layer")
    sources = name_sources(config, read_biases(fields), NAMES)
    return Reading(config, {name: _plus_one(name, source) for name, source in sources.items()})


def _plus_one(name: str, source: Source) -> Source:
    """LayerNorm1p: a stored weight is what the factor is more than 1; llama.cpp stores the factor."""
    return folded(source, lambda weight: weight + 1) if name.endswith("norm.weight") else source


def _gguf(header: Header) -> Reading:
    both = frozenset(NORM_EPS.values())  # as conversions write them
    config = read_gguf_config(header, "nemotron", "relu2", gated=False, norm="layer", partial_rotary=True, known=both)
    return Reading(config, gguf_sources(header, config))


FAMILY = Family(
    name="nemotron",
    models={"nemotron": "NemotronForCausalLM"},
    folder=_folder,
    gguf={"nemotron": _gguf},
    activations=("relu2",),
    example="nvidia/Minitron-4B-Base",
    checked="transformers",
)
