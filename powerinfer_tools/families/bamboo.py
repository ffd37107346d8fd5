"""Bamboo and TurboSparse-Mistral: Mistral whose FFN is relu(gate) * relu(up), which is called dReLU.

After PowerInfer/Bamboo-base-v0_1 and PowerInfer/TurboSparse-Mistral-Instruct: the config.json of both says model_type
bamboo and hidden_act relu, which BambooMLP applies to gate and up. Dense GGUF files of it are of the first PowerInfer's
llama.cpp, with llama's keys and interleaved q and k rows.
"""

from dataclasses import replace

from powerinfer_tools.checkpoint.fields import Fields
from powerinfer_tools.checkpoint.gguf_config import Header, gguf_sources, interleaved, read_gguf_config
from powerinfer_tools.checkpoint.huggingface_config import name_sources
from powerinfer_tools.checkpoint.sources import Reading
from powerinfer_tools.families.family import Family
from powerinfer_tools.families.llama import NAMES, read_llama_config, read_window

# TurboSparse-Mistral's modeling_bamboo.py lets only those neurons take part that a predictor, of the stream before the
# norm, foresees; the paper (Song et al. 2024) defines the model without it.
PREDICTOR_NOTE = "the model's own predictors (mlp.predictor) are left out: no neuron that fires is masked"


def _folder(fields: Fields, name: str, notes: list[str]) -> Reading:
    fields.choice("hidden_act", ("relu", "drelu"))
    config = read_llama_config(fields, name)
    n_ctx = read_window(fields, config.n_ctx, notes)
    config = replace(config, arch="bamboo", activation="drelu", n_ctx=n_ctx)
    return Reading(
        config,
        name_sources(config, (), NAMES),
        unused={".predictor.fc1.weight": PREDICTOR_NOTE, ".predictor.fc2.weight": ""},
    )


def _gguf(header: Header) -> Reading:
    config = read_gguf_config(header, "bamboo", "drelu")
    return Reading(config, interleaved(gguf_sources(header, config), config.head_dim))


FAMILY = Family(
    name="bamboo",
    models={"bamboo": "BambooForCausalLM"},
    folder=_folder,
    gguf={"bamboo": _gguf},
    pwri=(_gguf, "drelu"),
    activations=("drelu",),
    example="PowerInfer/Bamboo-base-v0_1, TurboSparse-Mistral-Instruct (without its predictors)",
    checked="its published code, written anew in the test",
)
