"""A Hugging Face folder: config.json, safetensors, tokenizer.json."""

import hashlib
from functools import cached_property
from pathlib import Path

import numpy as np

from powerinfer_tools.checkpoint.fields import Fields, read_json
from powerinfer_tools.checkpoint.huggingface_tokenizer import read_special, read_template, read_tokenizer
from powerinfer_tools.checkpoint.own_predictors import own_predictors
from powerinfer_tools.checkpoint.safetensors_files import DTYPES, PACKED, stored_tensors, weight_files
from powerinfer_tools.checkpoint.source import Checkpoint, FloatArray, OwnPredictors, check_rows
from powerinfer_tools.checkpoint.sources import Reading, Rows, check_stored
from powerinfer_tools.checkpoint.tensors import Shapes
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.families.registry import by_model_type

CONFIG_LIMIT = 1 << 20
TEXTS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
CONVERTED = ("tokenizer.model", "added_tokens.json")  # what a folder without tokenizer.json has
ROTARY = "rotary_emb.inv_freq"  # old programs wrote what config.json says


class HuggingFaceCheckpoint(Checkpoint):
    """Headers are read at once and checked against config.json; weights when they are asked for."""

    def __init__(self, path: Path, activation: str | None = None) -> None:
        self.path, self.notes = path, []
        values = read_json(path / "config.json", CONFIG_LIMIT)
        reading = _read_config(Fields(str(path / "config.json"), values), path.resolve().name, self.notes)
        self.config = reading.config
        if activation not in (None, self.config.activation):
            raise PowerinferError(
                f"{path}: config.json says the activation {self.config.activation}, expected {activation}", "usage"
            )
        self.sources = reading.sources
        self._shapes = {name: source.shape for name, source in self.sources.items()}
        self._tensors = stored_tensors(path)
        self.predictors = self._own_predictors(reading)
        self._check_tensors(reading)
        self.tokenizer_json, tokenizer = read_tokenizer(path)
        self.chat_template = read_template(path)
        self.special = read_special(path, values, tokenizer, self.config.n_vocab)
        self.metadata = {"name": self.config.name}
        if tokenizer.get_vocab_size() > self.config.n_vocab:
            self.notes.append(f"the tokenizer has tokens beyond the model's {self.config.n_vocab}: refused in prompts")
        if not self.special["eos"]:
            self.notes.append("no end-of-text token is recorded: answers end at the token limit")

    def names(self) -> frozenset[str]:
        return frozenset(self.sources)

    def read(self, name: str, rows: slice | None = None) -> FloatArray:
        begin, end = check_rows(self.path, self._shapes, name, rows)
        return self.sources[name].read(self._read_rows, np.arange(begin, end))

    def digest(self) -> str:
        return self._digest

    @cached_property
    def _digest(self) -> str:
        """Read once: the files have gigabytes, and every stage asks."""
        digest = hashlib.sha256()
        for path in text_files(self.path) + weight_files(self.path):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        return digest.hexdigest()

    def _read_rows(self, name: str, rows: Rows) -> FloatArray:
        """Rows of their tensor, each run of neighbours in one read."""
        tensor = self._tensors[name]
        ends = np.flatnonzero(np.diff(rows, append=-2) != 1) + 1
        if len(ends) <= 1:
            return tensor.read(name, *((rows[0], rows[-1] + 1) if len(rows) else (0, 0)))
        floats = np.empty((len(rows), *tensor.shape[1:]), np.float32)
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            floats[start:end] = tensor.read(name, rows[start], rows[end - 1] + 1)
        return floats

    def _found(self) -> Shapes:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def _own_predictors(self, reading: Reading) -> OwnPredictors | None:
        names, found = reading.predictors, self._found()
        if names is None or not names.all(self.config.n_layer) & found.keys():
            return None
        return own_predictors(self.path, names, found, self.config, self._read_rows)

    def _check_tensors(self, reading: Reading) -> None:
        unused = (*reading.unused, ROTARY, *(("lm_head.weight",) if self.config.tied else ()))
        needed = check_stored(self.path, reading.sources, self._found(), unused)
        for end, note in reading.unused.items():
            if note and any(name.endswith(end) for name in self._tensors):
                self.notes.append(note)
        if self.predictors is not None and reading.predictors is not None:
            needed |= reading.predictors.all(self.config.n_layer)
        for name in needed:
            types = PACKED if name in reading.packed else DTYPES
            if (dtype := self._tensors[name].dtype) not in types:
                known = ", ".join(types)
                raise PowerinferError(f"{self.path}: {name}: expected type {known}, found {dtype}", "unsupported")


def text_files(folder: Path) -> list[Path]:
    """What a folder has beside its weights, config.json first."""
    names = TEXTS if (folder / "tokenizer.json").is_file() else TEXTS + CONVERTED
    return [folder / name for name in names if (folder / name).is_file()]


def _read_config(fields: Fields, name: str, notes: list[str]) -> Reading:
    """What config.json's family makes of it; adds to notes what a user should know.

    Errors: an unknown model_type or class, named with those that are known; what the family refuses.
    """
    families = by_model_type()
    kind = fields.choice("model_type", families, _kind_of_class(fields.get("architectures")))
    architecture = families[kind].models[kind]
    if fields.get("architectures", [architecture]) != [architecture]:
        raise fields.unsupported("architectures", f"[{architecture!r}]")
    if "quantization_config" in fields and not families[kind].quantised:
        raise fields.unsupported("quantization_config", "float weights without it")
    return families[kind].folder(Fields(fields.where, {**fields.values, "model_type": kind}), name, notes)


def _kind_of_class(architectures: object) -> str | None:
    """The model_type of a folder that does not say it, as MiniCPM-S does not."""
    kinds = {family.models[kind]: kind for kind, family in by_model_type().items()}
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    return kinds.get(first) if isinstance(first, str) else None
