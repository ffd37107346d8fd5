"""What this machine's memories deliver: bandwidths and latencies of each tier, measured or read from a JSON file."""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.files import atomic_write, canonical_json, sha256_bytes

KIND, FORMAT = "machine", 1


@dataclass(frozen=True)
class Tier:
    """One memory. Bandwidths in bytes per second.

    n_bytes: its size, 0 where unknown; sequential: read from end to end; rows: (row bytes, bandwidth) of picked rows,
    by rising row size; latency_s: the first byte of one read (disk), or a vector to there or back (vram).
    Of a card alone: launch_s: one small step behind another; copy: from ram to there, 0 where unknown; context: bytes
    that it takes before anything is stored there.
    """

    n_bytes: int
    sequential: float
    rows: tuple[tuple[int, float], ...]
    latency_s: float = 0.0
    launch_s: float = 0.0
    copy: float = 0.0
    context: int = 0

    def row_bandwidth(self, row_bytes: float) -> float:
        """Bandwidth of picked rows: between measured sizes linear in the size's logarithm, beyond them constant."""
        if not self.rows or row_bytes <= self.rows[0][0]:
            return self.rows[0][1] if self.rows else self.sequential
        for (small, slow), (large, fast) in zip(self.rows, self.rows[1:], strict=False):
            if row_bytes <= large:
                share = math.log(row_bytes / small) / math.log(large / small)
                return slow + share * (fast - slow)
        return self.rows[-1][1]


@dataclass(frozen=True)
class Machine:
    """The tiers of one machine; vram and disk may be missing. notes: how it was measured and what to doubt; card: its
    name; disk_device: its number in the system, 0 where unknown."""

    name: str
    threads: int
    ram: Tier
    vram: Tier | None = None
    disk: Tier | None = None
    notes: tuple[str, ...] = ()
    card: str = ""
    disk_device: int = 0

    def to_json(self) -> dict[str, Any]:
        """The file's content."""
        return {"kind": KIND, "format": FORMAT, **asdict(self)}

    @property
    def in_sequence(self) -> "Machine":
        """The machine as a dense run meets it: no row is picked."""
        vram = None if self.vram is None else replace(self.vram, rows=())
        return replace(self, ram=replace(self.ram, rows=()), vram=vram)

    @property
    def digest(self) -> str:
        return sha256_bytes(canonical_json(self.to_json()).encode())


def write_machine(machine: Machine, path: Path, force: bool = False) -> None:
    """Writes the machine file, readable JSON."""
    with atomic_write(path, force) as file:
        file.write((json.dumps(machine.to_json(), indent=2, sort_keys=True) + "\n").encode())


def read_machine(path: Path) -> Machine:
    """The machine in a file. Errors name the field that is missing or out of range."""
    data = read_json(path, KIND, FORMAT)
    try:
        return Machine(
            name=str(data["name"]),
            threads=int(data["threads"]),
            ram=_tier(data["ram"]),
            vram=None if data.get("vram") is None else _tier(data["vram"]),
            disk=None if data.get("disk") is None else _tier(data["disk"]),
            notes=tuple(str(note) for note in data.get("notes", ())),
            card=str(data.get("card", "")),
            disk_device=int(data.get("disk_device", 0)),
        )
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise PowerinferError(f"{path}: not a valid machine file: {error!r}", "malformed") from error


def _tier(data: dict[str, Any]) -> Tier:
    rows = tuple((int(size), float(speed)) for size, speed in data["rows"])
    latency_s, launch_s, copy = (float(data.get(name, 0.0)) for name in ("latency_s", "launch_s", "copy"))
    n_bytes, context = int(data["n_bytes"]), int(data.get("context", 0))
    tier = Tier(n_bytes, float(data["sequential"]), rows, latency_s, launch_s, copy, context)
    speeds = [tier.sequential, *(speed for _, speed in rows)]
    if not all(math.isfinite(speed) and speed > 0 for speed in speeds):
        raise ValueError(f"expected bandwidths above 0, found {speeds}")
    others = {name: getattr(tier, name) for name in ("latency_s", "launch_s", "copy", "context", "n_bytes")}
    if not all(math.isfinite(value) and value >= 0 for value in others.values()):
        raise ValueError(f"expected values of at least 0, found {others}")
    sizes = [size for size, _ in rows]
    if sizes != sorted(set(sizes)) or any(size < 1 for size in sizes):
        raise ValueError(f"expected rows by rising size, found {sizes}")
    return tier


def read_json(path: Path, kind: str, newest: int) -> dict[str, Any]:
    """The JSON object of a file of ours. Errors: no file, no JSON, another kind, a newer format."""
    if not path.is_file():
        raise PowerinferError(f"{path}: no such file", "usage")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PowerinferError(f"{path}: expected a {kind} file (JSON), found {error}", "malformed") from error
    if not isinstance(data, dict) or data.get("kind") != kind:
        found = data.get("kind") if isinstance(data, dict) else type(data).__name__
        raise PowerinferError(f"{path}: expected a file of kind {kind}, found kind {found}", "mismatch")
    if not isinstance(data.get("format"), int) or data["format"] > newest:
        raise PowerinferError(
            f"{path}: format {data.get('format')} is not one this program reads ({newest})", "unsupported"
        )
    return data
