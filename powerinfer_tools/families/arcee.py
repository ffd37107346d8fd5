"""Arcee's AFM: a LLaMA whose FFN is plain, with squared ReLU."""

from powerinfer_tools.checkpoint.fields import Fields
from powerinfer_tools.checkpoint.gguf_config import Header, gguf_sources, interleaved, read_gguf_config
from powerinfer_tools.checkpoint.huggingface_config import name_sources, read_biases, read_plain_config
from powerinfer_tools.checkpoint.sources import Reading
from powerinfer_tools.families.family import Family
from powerinfer_tools.families.llama import NAMES


def _folder(fields: Fields, name: str, notes: list[str]) -> Reading:
    config = read_plain_config(fields, "arcee", name, gated=False)
    return Reading(config, name_sources(config, read_biases(fields), NAMES))


def _gguf(header: Header) -> Reading:
    config = read_gguf_config(header, "arcee", "relu2", gated=False)
    return Reading(config, interleaved(gguf_sources(header, config), config.head_dim))


FAMILY = Family(
    name="arcee",
    models={"arcee": "ArceeForCausalLM"},
    folder=_folder,
    gguf={"arcee": _gguf},
    activations=("relu2",),
    example="arcee-ai/AFM-4.5B",
    checked="transformers",
)
