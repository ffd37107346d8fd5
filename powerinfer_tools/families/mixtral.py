"""Mixtral and TurboSparse-Mixtral: Mistral with experts, of which a router chooses a few by the FFN's input.

TurboSparse-Mixtral's experts are relu(gate) * relu(up) (Song et al. 2024, arXiv 2406.05955, eq. 4). Its config.json is
taken to say hidden_act relu for that, as TurboSparse-Mistral's does. As GGUF both are a llama that has experts.
"""

from dataclasses import replace

from powerinfer_tools.checkpoint.experts import expert_sources, with_experts
from powerinfer_tools.checkpoint.fields import Fields
from powerinfer_tools.checkpoint.huggingface_config import name_sources, read_plain_config
from powerinfer_tools.checkpoint.sources import Reading
from powerinfer_tools.families.family import Family
from powerinfer_tools.families.llama import NAMES, read_window

MOE = "block_sparse_moe"
PREDICTOR_NOTE = "the experts' own predictors are left out: no neuron that fires is masked"
MATRICES = {
    part: f"model.layers.{{i}}.{MOE}.experts.{{e}}.{name}.weight"
    for part, name in {"ffn_gate": "w1", "ffn_up": "w3", "ffn_down": "w2"}.items()
}


def _folder(fields: Fields, name: str, notes: list[str]) -> Reading:
    config = read_plain_config(fields, "mixtral", name, rope_theta=1e6)
    if fields.text("model_type") == "turbosparsemixtral":
        fields.choice("hidden_act", ("relu", "drelu"))
        config = replace(config, activation="drelu")
    if "sliding_window" in fields:
        config = replace(config, n_ctx=read_window(fields, config.n_ctx, notes))
    config = with_experts(config, fields, ("num_local_experts", "num_experts_per_tok"), "softmax", "ffn_input")
    names = {**NAMES, "ffn_router": f"{MOE}.gate"}
    sources = name_sources(config, (), names) | expert_sources(config, MATRICES)
    return Reading(config, sources, unused={".predictor.fc1.weight": PREDICTOR_NOTE, ".predictor.fc2.weight": ""})


FAMILY = Family(
    name="mixtral",
    models={"mixtral": "MixtralForCausalLM", "turbosparsemixtral": "TurboSparseMixtralForCausalLM"},
    folder=_folder,
    activations=("silu", "drelu"),
    example="mistralai/Mixtral-8x7B-v0.1, PowerInfer/TurboSparse-Mixtral",
    checked="transformers; drelu: its published definition, written anew in the test",
)
