"""Bamboo and TurboSparse-Mistral: Mistral whose FFN is relu(gate) * relu(up), which is called dReLU.

After PowerInfer/Bamboo-base-v0_1 and PowerInfer/TurboSparse-Mistral-Instruct: the config.json of both says model_type
bamboo and hidden_act relu, which BambooMLP applies to gate and up. Dense GGUF files of it are of the first PowerInfer's
llama.cpp, with llama's keys and interleaved q and k rows.
"""

from dataclasses import replace

import numpy as np

from powerinfer_tools.checkpoint.fields import Fields
from powerinfer_tools.checkpoint.gguf_config import Header, gguf_sources, interleaved, read_gguf_config
from powerinfer_tools.checkpoint.huggingface_config import name_sources
from powerinfer_tools.checkpoint.sources import PredictorNames, Reading
from powerinfer_tools.families.family import Family, Pwri
from powerinfer_tools.families.llama import NAMES, read_llama_config, read_window

# TurboSparse-Mistral's modeling_bamboo.py lets only those neurons take part for which round(sigmoid(logit)) is 1: of
# logits above 0, not 0 itself, for halves are rounded to even. The paper (Song et al. 2024) defines it without them.
ABOVE_ZERO = float(np.finfo(np.float32).tiny)
PREDICTORS = PredictorNames(
    "model.layers.{i}.mlp.predictor.fc1.weight", "model.layers.{i}.mlp.predictor.fc2.weight", ABOVE_ZERO
)
PREDICTOR_NOTE = "predictors of its own (mlp.predictor): build takes them over, profile and train compute without them"


def _folder(fields: Fields, name: str, notes: list[str]) -> Reading:
    fields.choice("hidden_act", ("relu", "drelu"))
    config = read_llama_config(fields, name)
    n_ctx = read_window(fields, config.n_ctx, notes)
    config = replace(config, arch="bamboo", activation="drelu", n_ctx=n_ctx)
    return Reading(
        config,
        name_sources(config, (), NAMES),
        unused={".predictor.fc1.weight": PREDICTOR_NOTE, ".predictor.fc2.weight": ""},
        predictors=PREDICTORS,
    )


def _gguf(header: Header) -> Reading:
    config = read_gguf_config(header, "bamboo", "drelu")
    return Reading(config, interleaved(gguf_sources(header, config), config.head_dim))


FAMILY = Family(
    name="bamboo",
    models={"bamboo": "BambooForCausalLM"},
    folder=_folder,
    gguf={"bamboo": _gguf},
    pwri=Pwri(_gguf, "drelu"),
    activations=("drelu",),
    example="PowerInfer/Bamboo-base-v0_1, TurboSparse-Mistral-Instruct",
    checked="its published code, written anew in the test",
)
