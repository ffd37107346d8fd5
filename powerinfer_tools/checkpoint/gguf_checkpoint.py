"""A GGUF file as llama.cpp writes it: any type that the gguf package dequantises."""

import hashlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from powerinfer_tools.artifact.layout import KEY_VERSION
from powerinfer_tools.checkpoint.fields import Fields
from powerinfer_tools.checkpoint.gguf_config import ROPE_FACTORS, Header
from powerinfer_tools.checkpoint.gguf_file import GgufFile, raw_rows, read_gguf
from powerinfer_tools.checkpoint.gguf_tokenizer import read_special, rebuild_tokenizer
from powerinfer_tools.checkpoint.huggingface_tokenizer import TEMPLATE_LIMIT
from powerinfer_tools.checkpoint.source import Checkpoint, FloatArray, check_rows
from powerinfer_tools.checkpoint.sources import Reading, Rows, check_stored
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.families.family import Reader
from powerinfer_tools.families.registry import by_architecture

CHUNK = 1 << 22  # elements dequantised at once
DESCRIPTIONS = ("name", "license", "license.name", "license.link", "organization", "author", "url")


class GgufCheckpoint(Checkpoint):
    """The header is read at once; rows are dequantised when they are asked for."""

    def __init__(self, path: Path, activation: str | None = None) -> None:
        self.path, self.notes = path, []
        self._file = self._open()
        readers = self._readers()
        header = _read_header(self._file, readers, activation, self.notes)
        fields = header.fields
        reading = self._reading(header, readers[fields.text("general.architecture")])
        self.config, self._sources = reading.config, reading.sources
        self._activation = activation or self.config.activation
        self._shapes = {name: source.shape for name, source in reading.sources.items()}
        found = {name: tensor.shape[::-1] for name, tensor in self._file.tensors.items()}
        check_stored(path, reading.sources, found, (*reading.unused, ROPE_FACTORS))
        self.tokenizer_json = rebuild_tokenizer(fields)
        self.special = read_special(fields)
        self.chat_template = _template(fields)
        described = {key: fields.values.get(f"general.{key}") for key in DESCRIPTIONS}
        self.metadata = {key: value for key, value in described.items() if isinstance(value, str)}
        self.metadata["name"] = self.config.name
        if not self.special["eos"]:
            self.notes.append("no end-of-text token is recorded: answers end at the token limit")

    def _open(self) -> GgufFile:
        return read_gguf(self.path, strict=False)

    def _readers(self) -> dict[str, Reader]:
        """What reads such a file, by its architecture."""
        return by_architecture()

    def _reading(self, header: Header, reader: Reader) -> Reading:
        return reader(header)

    def names(self) -> frozenset[str]:
        return frozenset(self._shapes)

    def read(self, name: str, rows: slice | None = None) -> FloatArray:
        begin, end = check_rows(self.path, self._shapes, name, rows)
        return self._sources[name].read(self._read_rows, np.arange(begin, end))

    def digest(self) -> str:
        return self._digest

    @cached_property
    def _digest(self) -> str:
        """Read once: the file has gigabytes, and every stage asks."""
        digest = hashlib.sha256(f"activation {self._activation}\n".encode())
        with self.path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()

    def _read_rows(self, name: str, rows: Rows) -> FloatArray:
        if len(self._file.tensors[name].shape) == 1:
            return np.ascontiguousarray(self._dequantize(name, np.arange(1))[0][rows])
        return self._dequantize(name, rows)

    def _dequantize(self, name: str, rows: Rows) -> FloatArray:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        kind = GGMLQuantizationType(self._file.tensors[name].type)
        raw = raw_rows(self._file, name)
        n = self._file.tensors[name].shape[0]
        floats = np.empty((len(rows), n), np.float32)
        step = max(1, CHUNK // n)
        try:
            for start in range(0, len(rows), step):
                part = slice(start, start + step)
                floats[part] = dequantize(np.ascontiguousarray(raw[rows[part]]), kind)
        except NotImplementedError as error:
            where = f"{self.path}: {name}"
            raise PowerinferError(
                f"{where}: expected a type that can be dequantised, found {kind.name}", "unsupported"
            ) from error
        return floats


def _read_header(file: GgufFile, known: Iterable[str], activation: str | None, notes: list[str]) -> Header:
    """Errors: an artifact of ours; an architecture that no family reads, named with those that are."""
    metadata = file.metadata
    fields = Fields(str(file.path), metadata)
    if KEY_VERSION in fields:
        raise PowerinferError(f"{file.path}: expected a checkpoint, found a powerinfer artifact", "mismatch")
    prefix = fields.choice("general.architecture", known) + "."
    sizes = {key: _one(value) for key, value in metadata.items() if key.startswith(prefix)}
    return Header(file, fields, Fields(str(file.path), sizes, prefix), activation, notes)


def _one(value: Any) -> Any:
    """A size that is written once for each layer, as one number where all layers agree."""
    if isinstance(value, list) and value and all(v == value[0] for v in value):
        return value[0]
    return value


def _template(fields: Fields) -> str | None:
    key = "tokenizer.chat_template"
    template = fields.text(key) if key in fields else None
    if template is not None and len(template.encode()) > TEMPLATE_LIMIT:
        raise fields.error(key, f"at most {TEMPLATE_LIMIT} bytes", f"{len(template)} characters", "malformed")
    return template
