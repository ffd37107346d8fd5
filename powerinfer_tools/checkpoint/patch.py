"""Trained weights over a base checkpoint: whole tensors, or patches of low rank in a file of their own."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from powerinfer_tools.checkpoint.config import ACTIVATIONS
from powerinfer_tools.checkpoint.fields import Fields
from powerinfer_tools.checkpoint.source import Checkpoint, FloatArray, check_finite, check_rows
from powerinfer_tools.checkpoint.tensors import Shapes, bias_shapes, required_shapes
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.files import Array, Table, canonical_json, read_table, require_same, sha256_bytes, write_table

KIND = "patch"


class Merged(Checkpoint):
    """A base with another activation and some tensors changed: `name` replaces one, `name`.a and .b add a . b to it.

    changes: by name; asked for again with every read, so they may lie in a file. patch: that file's digest, if any.
    """

    def __init__(
        self,
        base: Checkpoint,
        activation: str,
        thresholds: tuple[float, ...],
        changes: Mapping[str, Array],
        patch: str | None = None,
    ) -> None:
        self.base, self.changes, self.patch = base, changes, patch
        self.path, self.notes = base.path, base.notes
        self.config = base.config.sparsified(activation, thresholds)
        self.tokenizer_json, self.chat_template = base.tokenizer_json, base.chat_template
        self.special, self.metadata = base.special, base.metadata
        self._names, self._activation = frozenset(changes), [activation, list(thresholds)]

    def names(self) -> frozenset[str]:
        return self.base.names()

    def read(self, name: str, rows: slice | None = None) -> FloatArray:
        if name in self._names:
            whole = self.changes[name].astype(np.float32)
            begin, end = check_rows(self.path, {name: whole.shape}, name, rows)
            return whole[begin:end]
        stored = self.base.read(name, rows)
        if f"{name}.a" not in self._names:
            return stored
        a, b = self.changes[f"{name}.a"], self.changes[f"{name}.b"]
        sum_: FloatArray = stored + a[rows or slice(None)].astype(np.float32) @ b.astype(np.float32)
        return sum_

    def digest(self) -> str:
        parts = [sha256_bytes(self.changes[name].tobytes()) for name in sorted(self._names)]
        return sha256_bytes(canonical_json([self.base.digest(), self._activation, sorted(self._names), parts]).encode())

    @property
    def inputs(self) -> dict[str, str]:
        return {"base": self.base.digest()} | ({"patch": self.patch} if self.patch else {})


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
    """The patch at `path`, its header checked. Errors: not a file of this kind, of a newer format, a wrong field."""
    table = read_table(path, KIND)
    fields = Fields(str(path), table.header)
    fields.choice("activation", ACTIVATIONS)
    thresholds = fields.values.get("thresholds")
    if not isinstance(thresholds, list) or not all(type(t) in (int, float) and 0 <= t < math.inf for t in thresholds):
        raise fields.error("thresholds", "numbers, not negative", thresholds)
    inputs = fields.values.get("inputs")
    if not isinstance(inputs, dict) or not isinstance(inputs.get("checkpoint"), str):
        raise fields.error("inputs", "the digest of a checkpoint", inputs)
    fields.text("model")
    return table


def check_numbers(path: Path, table: Table) -> None:
    """Errors: a number in the patch that is not finite."""
    for name in table.arrays:
        check_finite(f"{path}: {name}", table.arrays[name])


def merge(base: Checkpoint, path: Path) -> Merged:
    """The checkpoint that a patch makes of its base; weights are merged row by row when they are read.

    Errors: those of read_patch; the patch of another checkpoint; a tensor that the base has not, of another shape or
    not finite.
    """
    table = read_patch(path)
    remedy = f"{base.path} is not what this patch was trained on"
    require_same("checkpoint", path, table.header["inputs"]["checkpoint"], base.digest(), remedy)
    thresholds = tuple(float(t) for t in table.header["thresholds"])
    if len(thresholds) != base.config.n_layer:
        raise PowerinferError(
            f"{path}: thresholds: expected {base.config.n_layer} numbers, found {len(thresholds)}", "mismatch"
        )
    _check_fit(path, table.arrays, base)
    return Merged(base, table.header["activation"], thresholds, table.arrays, table.digest)


def _check_fit(path: Path, changes: Mapping[str, Array], base: Checkpoint) -> None:
    """Every change is finite, belongs to a tensor of the base and has its shape, whole or as [out, r] and [r, in]."""
    known = required_shapes(base.config) | bias_shapes(base.config)
    found: dict[str, Shapes] = {}
    for key in changes:
        name = key.removesuffix(".a").removesuffix(".b")
        if name not in base.names():
            raise PowerinferError(f"{path}: expected tensors of {base.path}, found {key}", "mismatch")
        change = changes[key]  # one at a time, for they lie in a file
        check_finite(f"{path}: {key}", change)
        found.setdefault(name, {})[key[len(name) :]] = change.shape
    for name, parts in found.items():
        expected: Shapes = {"": known[name]}
        if "" not in parts and len(known[name]) == 2:
            (n_out, n_in), rank = known[name], (*parts.get(".a", ()), 0, 0)[1]
            expected = {".a": (n_out, rank), ".b": (rank, n_in)}
        if parts != expected:
            raise PowerinferError(f"{path}: {name}: expected {_shown(expected)}, found {_shown(parts)}", "mismatch")


def _shown(shapes: Shapes) -> str:
    return ", ".join(f"{part[1:] or 'whole'} {list(shape)}" for part, shape in sorted(shapes.items()))
