"""A checkpoint as a Hugging Face folder, one tensor in memory at a time."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from powerinfer_tools.checkpoint.config import Config
from powerinfer_tools.checkpoint.fields import read_json
from powerinfer_tools.checkpoint.huggingface import CONFIG_LIMIT, HuggingFaceCheckpoint, text_files
from powerinfer_tools.checkpoint.huggingface_config import THRESHOLDS, name_sources
from powerinfer_tools.checkpoint.rope import plain_theta
from powerinfer_tools.checkpoint.safetensors_files import SINGLE
from powerinfer_tools.checkpoint.source import Checkpoint
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.families.llama import NAMES
from powerinfer_tools.files import Array, atomic_write, write_safetensors


def write_folder(base: Checkpoint, checkpoint: Checkpoint, folder: Path) -> None:
    """Writes `checkpoint` into an empty folder; what is no weight is taken from `base`, its own or what it was made of.

    Weights are float32. Errors: those of base_config.
    """
    config = base_config(base) | activation_fields(checkpoint.config) | {"dtype": "float32", "torch_dtype": "float32"}
    _write_json(folder / "config.json", config)
    if isinstance(base, HuggingFaceCheckpoint):
        for path in text_files(base.path)[1:]:
            shutil.copyfile(path, folder / path.name)
    else:
        _write_texts(base, folder)
    write_safetensors(folder / SINGLE, {"format": "pt"}, _Weights(checkpoint, stored_names(base)))


def activation_fields(config: Config) -> dict[str, Any]:
    """The fields of config.json that say what a neuron computes.

    With thresholds, hidden_act has a name that other programs refuse: they would leave the cut out.
    """
    if not any(config.thresholds) and config.activation != "fatrelu":
        return {"hidden_act": config.activation}
    name = "silu_cut" if config.activation == "silu" else config.activation
    return {"hidden_act": name, THRESHOLDS: list(config.thresholds)}


def base_config(base: Checkpoint) -> dict[str, Any]:
    """The config.json of a checkpoint. Errors: a GGUF file of another family than llama, with biases, or whose rotary
    frequencies are scaled.
    """
    if isinstance(base, HuggingFaceCheckpoint):
        return read_json(base.path / "config.json", CONFIG_LIMIT)
    config = base.config
    if config.arch != "llama":
        raise PowerinferError(f"{base.path}: expected a llama GGUF file, found {config.arch}: {_FOLDER}", "unsupported")
    if base.biases:
        raise PowerinferError(f"{base.path}: expected no biases in a GGUF file, found some: {_FOLDER}", "unsupported")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.n_vocab,
        "hidden_size": config.n_embd,
        "intermediate_size": config.n_ff,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_head_kv,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.n_ctx,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": _rope_theta(base),
        "tie_word_embeddings": config.tied,
        "bos_token_id": base.special["bos"],
        "eos_token_id": base.special["eos"],
    }


def stored_names(base: Checkpoint) -> dict[str, str]:
    """Hugging Face's names of all tensors, each with ours. Errors: one that is not stored as it is used."""
    sources = base.sources if isinstance(base, HuggingFaceCheckpoint) else name_sources(base.config, (), NAMES)
    names = {source.stored_as: name for name, source in sources.items()}
    if None in names:
        found = f"{names[None]} put together"
        raise PowerinferError(f"{base.path}: expected tensors stored as they are used, found {found}", "unsupported")
    return {theirs: name for theirs, name in names.items() if theirs is not None}


_FOLDER = "give the Hugging Face folder that it was made from"


def _rope_theta(base: Checkpoint) -> float:
    assert base.config.rope is not None
    theta = plain_theta(base.config.rope, base.config.head_dim)
    if theta is None:
        raise PowerinferError(
            f"{base.path}: expected plain rotary positions in a GGUF file, found scaled ones: {_FOLDER}", "unsupported"
        )
    return theta


def _write_texts(base: Checkpoint, folder: Path) -> None:
    with atomic_write(folder / "tokenizer.json") as file:
        file.write(base.tokenizer_json.encode())
    special = base.special
    names = {key: special[key] for key in ("bos_token", "eos_token") if special[key]}
    template = {} if base.chat_template is None else {"chat_template": base.chat_template}
    _write_json(folder / "tokenizer_config.json", names | template | {"add_bos_token": special["add_bos"]})
    _write_json(folder / "generation_config.json", {f"{key}_token_id": special[key] for key in ("bos", "eos")})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False).encode())


class _Weights(Mapping[str, Array]):
    """All tensors under their Hugging Face names, read one at a time."""

    def __init__(self, checkpoint: Checkpoint, names: dict[str, str]) -> None:
        self._checkpoint, self._names = checkpoint, names

    def __getitem__(self, name: str) -> Array:
        return self._checkpoint.read(self._names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
