"""A model file of the first PowerInfer: a GGUF file but for its magic, with a row a neuron in ffn_down and predictors.

What it adds to llama.cpp's format of its time: blk.N.ffn_down_t.weight instead of ffn_down, transposed;
blk.N.fc1.weight and fc2.weight, the layer's predictor; powerinfer.sparse_threshold, which its logits are to reach.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from powerinfer_tools.artifact.layout import KEY_ACTIVATION, TYPE_ID
from powerinfer_tools.checkpoint.fields import Fields
from powerinfer_tools.checkpoint.gguf_checkpoint import GgufCheckpoint
from powerinfer_tools.checkpoint.gguf_config import Header
from powerinfer_tools.checkpoint.gguf_file import PWRI, GgufFile, raw_rows, read_gguf
from powerinfer_tools.checkpoint.own_predictors import own_predictors
from powerinfer_tools.checkpoint.source import FloatArray, check_rows
from powerinfer_tools.checkpoint.sources import PredictorNames, Reading, ReadRows, Rows, Source, stored
from powerinfer_tools.families.family import Reader
from powerinfer_tools.families.registry import by_pwri_architecture

KEY_THRESHOLD = "powerinfer.sparse_threshold"


class PwriCheckpoint(GgufCheckpoint):
    """Every layer has a predictor."""

    def __init__(self, path: Path, activation: str | None = None) -> None:
        self._asked = activation
        super().__init__(path, activation)
        threshold = _threshold(Fields(str(path), self._file.metadata))
        names = PredictorNames("blk.{i}.fc1.weight", "blk.{i}.fc2.weight", threshold)
        found = {name: tensor.shape[::-1] for name, tensor in self._file.tensors.items()}
        self.predictors = own_predictors(path, names, found, self.config, self._read_rows)
        if path.with_name(f"{path.name}.generated.gpuidx").exists():
            self.notes.append("its .gpuidx file is not needed: neurons are placed anew for each machine")

    @property
    def quant(self) -> str | None:
        """The type of the neurons, as artifact.layout.BLOCK names it; None for one that artifacts do not have."""
        return self._type("blk.0.ffn_up.weight")

    def head_type(self, quant: str) -> str | None:
        """Files in Q4_0 have it finer, mostly in Q6_K, which artifacts do not have: q8_0 loses least."""
        if quant != self.quant or self.config.tied:
            return None
        return self._type("output.weight") or "q8_0"

    def stored(self, name: str, type: str, rows: slice) -> npt.NDArray[np.uint8] | None:
        if name.endswith("ffn_down_t.weight"):
            return self._raw(name, type, np.arange(rows.start, rows.stop))
        begin, end = check_rows(self.path, self._shapes, name, rows)
        source, places = self._sources[name], np.arange(begin, end)
        if source.index is not None:
            return self._raw(next(iter(source.needs)), type, source.index(places))
        return self._raw(source.stored_as, type, places) if source.stored_as is not None else None

    def _type(self, name: str) -> str | None:
        found = self._file.tensors[name].type
        return next((name for name, number in TYPE_ID.items() if number == found), None)

    def _raw(self, theirs: str, type: str, rows: Rows) -> npt.NDArray[np.uint8] | None:
        if self._file.tensors[theirs].type != TYPE_ID[type]:
            return None
        return raw_rows(self._file, theirs)[rows]

    def _open(self) -> GgufFile:
        file = read_gguf(self.path, strict=False, magic=PWRI)
        return replace(file, metadata=_as_llama_cpp_says(Fields(str(self.path), file.metadata), self._asked))

    def _readers(self) -> dict[str, Reader]:
        return {arch: pwri.read for arch, pwri in by_pwri_architecture().items()}

    def _reading(self, header: Header, reader: Reader) -> Reading:
        reading = super()._reading(header, reader)
        config, sources = reading.config, dict(reading.sources)
        for i in range(config.n_layer):
            b, shape = f"blk.{i}", (config.n_ff, config.n_embd)
            sources[f"{b}.ffn_down.weight"] = _transposed(f"{b}.ffn_down_t.weight", shape)
            if f"{b}.ffn_down_t.bias" in header.file.tensors:
                sources[f"{b}.ffn_down.bias"] = stored(f"{b}.ffn_down_t.bias", shape[1:])
        return replace(reading, sources=sources, unused={**reading.unused, ".fc1.weight": "", ".fc2.weight": ""})


def _transposed(theirs: str, shape: tuple[int, int]) -> Source:
    """Our rows are columns of theirs."""

    def read(read_rows: ReadRows, rows: Rows) -> FloatArray:
        return np.ascontiguousarray(read_rows(theirs, np.arange(shape[0])).T[rows])

    return Source(shape[::-1], {theirs: shape}, read)


def _as_llama_cpp_says(fields: Fields, activation: str | None) -> dict[str, Any]:
    """The keys as a family reads them, with what its engine knew without; activation: what the user says that it is.

    Errors: an architecture that it had not.
    """
    known = by_pwri_architecture()
    pwri = known[fields.choice("general.architecture", known)]
    keys = {**pwri.assumed, **fields.values}
    if activation is None:
        keys.setdefault(KEY_ACTIVATION, pwri.activation)
    if keys.get("tokenizer.ggml.model") == "gpt2":
        keys.setdefault("tokenizer.ggml.pre", "gpt-2")
    return keys


def _threshold(fields: Fields) -> float:
    value = fields.get(KEY_THRESHOLD, 0.0)
    if not isinstance(value, float) or not math.isfinite(value):
        raise fields.error(KEY_THRESHOLD, "a finite number", value)
    return value
