"""The .placement file: canonical JSON, equal bytes for equal inputs."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from powerinfer_tools import __version__
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.files import atomic_write, canonical_json
from powerinfer_tools.placement.machine import read_json
from powerinfer_tools.placement.place import Placement

KIND, FORMAT = "placement", 1


def placement_json(placement: Placement) -> dict[str, Any]:
    """What the file holds."""
    return {"kind": KIND, "format": FORMAT, "tool": f"powerinfer {__version__}", **asdict(placement)}


def write_placement(placement: Placement, path: Path, force: bool = False) -> None:
    """Writes the file, whole or not at all."""
    with atomic_write(path, force) as file:
        file.write((canonical_json(placement_json(placement)) + "\n").encode())


def read_placement(path: Path) -> Placement:
    """The placement in a file. Errors: fields missing, prefixes out of order or of unequal number."""
    data = read_json(path, KIND, FORMAT)
    fields = {name: data[name] for name in Placement.__dataclass_fields__ if name in data}
    try:
        placement = Placement(**fields)
    except TypeError as error:
        raise PowerinferError(f"{path}: fields are missing: {error}", "malformed") from error
    _check(path, placement)
    return placement


def _check(path: Path, placement: Placement) -> None:
    for name in ("vram", "ram", "dense"):
        values = getattr(placement, name)
        if (
            not isinstance(values, list)
            or len(values) != len(placement.vram)
            or not all(isinstance(v, int) for v in values)
        ):
            raise PowerinferError(
                f"{path}: {name}: expected one whole number a layer, found {values!r:.60}", "malformed"
            )
    if not isinstance(placement.n_ff, int) or not isinstance(placement.inputs, dict):
        raise PowerinferError(f"{path}: expected n_ff a number and inputs an object, found others", "malformed")
    for i, (k1, k2) in enumerate(zip(placement.vram, placement.ram, strict=True)):
        if not 0 <= k1 <= k2 <= placement.n_ff:
            found = f"{k1}, {k2}"
            raise PowerinferError(
                f"{path}: layer {i}: expected 0 <= k1 <= k2 <= {placement.n_ff}, found {found}", "malformed"
            )
