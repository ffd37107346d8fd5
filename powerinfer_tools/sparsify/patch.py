"""Trained weights over a base checkpoint: whole tensors, or patches of low rank in a file of their own."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from powerinfer_tools.checkpoint.source import Checkpoint, FloatArray, check_rows
from powerinfer_tools.files import Array, Table, canonical_json, read_table, require_same, sha256_bytes, write_table

KIND = "patch"


class Merged(Checkpoint):
    """A base with another activation and some tensors changed: `name` replaces one, `name`.a and .b add a . b to it."""

    def __init__(
        self, base: Checkpoint, activation: str, thresholds: tuple[float, ...], changes: Mapping[str, Array]
    ) -> None:
        self.base, self.changes = base, changes
        self.path, self.notes = base.path, base.notes
        self.config = base.config.sparsified(activation, thresholds)
        self.tokenizer_json, self.chat_template = base.tokenizer_json, base.chat_template
        self.special, self.metadata = base.special, base.metadata

    def names(self) -> frozenset[str]:
        return self.base.names()

    def read(self, name: str, rows: slice | None = None) -> FloatArray:
        if name in self.changes:
            whole = self.changes[name].astype(np.float32)
            begin, end = check_rows(self.path, {name: whole.shape}, name, rows)
            return whole[begin:end]
        stored = self.base.read(name, rows)
        if f"{name}.a" not in self.changes:
            return stored
        a, b = (self.changes[f"{name}.{part}"].astype(np.float32) for part in "ab")
        sum_: FloatArray = stored + (a if rows is None else a[rows]) @ b
        return sum_

    def digest(self) -> str:
        parts = [sha256_bytes(self.changes[name].tobytes()) for name in sorted(self.changes)]
        config = [self.config.activation, list(self.config.thresholds)]
        return sha256_bytes(canonical_json([self.base.digest(), config, sorted(self.changes), parts]).encode())


def write_patch(path: Path, merged: Merged, force: bool = False) -> str:
    """Writes what `merged` changes as one safetensors file, with its base's digest; returns the file's digest."""
    header = {
        "inputs": {"checkpoint": merged.base.digest()},
        "model": merged.config.name,
        "activation": merged.config.activation,
        "thresholds": merged.config.thresholds,
    }
    return write_table(path, KIND, header, merged.changes, force)


def read_patch(path: Path) -> Table:
    """The patch at `path`. Errors: not a file of this kind, or of a newer format."""
    return read_table(path, KIND)


def merge(base: Checkpoint, path: Path) -> Merged:
    """The checkpoint that a patch makes of its base. Errors: no patch, or the patch of another checkpoint."""
    table = read_patch(path)
    remedy = "a patch goes with the checkpoint that it was trained on"
    require_same("checkpoint", path, table.header["inputs"]["checkpoint"], base.digest(), remedy)
    return Merged(base, table.header["activation"], tuple(table.header["thresholds"]), dict(table.arrays))
