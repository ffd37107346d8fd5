"""Measures this machine through the native library: RAM, the disk by reading a file, a card."""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np

from powerinfer_tools.engine.engine import default_threads
from powerinfer_tools.engine.native import DEVICES, describe_card, measure_card, measure_rows
from powerinfer_tools.engine.native import measure_file as measure_reads
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.placement.machine import Machine, Tier, read_machine, write_machine

BUFFER_BYTES = 512 << 20  # one row in ten is beyond most caches of a processor
CARD_BUFFER_BYTES = 8 << 30  # at most, of a quarter of its free memory: one row in ten is beyond its cache
ROW_BYTES = (1152, 2304, 4608, 9216, 18432)
MATRIX_ROW = 2304  # bytes: 4096 weights in Q4_0
STRIDE_ROWS = 10  # one row in ten: a typical active share
FILE_BYTES = 128 << 20
READ_BYTES = (4096, 8192, 16384, 65536, 1 << 20)
READS, LANDING_BYTES = 256, 16 << 20  # that one layer asks for, and where they arrive
SECONDS = 0.3  # of each disk measurement
VECTOR_BYTES = 16384  # that cross in a merge


def measure_machine(
    threads: int | None = None,
    folder: Path | None = None,
    say: Callable[[str], None] | None = None,
    card: bool = True,
) -> Machine:
    """The machine's tiers. folder: where the disk is measured (a temporary file); None: no disk is measured.

    card: its card, too, if there is one; else none is touched.
    """
    tell = say or (lambda text: None)
    threads = threads or default_threads()
    tell(f"measuring ram, {threads} threads")
    machine = Machine(_processor(), threads, measure_ram(threads))
    if folder is not None:
        machine = with_disk(machine, folder, tell)
    try:
        return with_card(machine, tell) if card else machine
    except PowerinferError as error:
        return replace(machine, notes=(*machine.notes, f"no card: {error}"))


def cached_machine(
    where: Path | None,
    threads: int | None = None,
    say: Callable[[str], None] | None = None,
    card: bool = False,
    apart: bool = False,
) -> Machine:
    """The last measurement of this processor with as many threads, or a new one, kept in the user's cache folder.

    where: the folder whose disk is measured, or a file there to read; None: it need not be; card: with the card that is
    there now and what its context takes now, else none is touched; apart: what is missing is measured by a process of
    its own, which takes the memory for it. Errors: there is no card.
    """
    tell = say or (lambda text: None)
    threads = threads or default_threads()
    name, _, _, context = describe_card(device()) if card else ("", 0, 0, 0)  # first: without one nothing is measured
    before = _kept(threads)
    if before is not None and not _lacks_disk(before, where) and (not card or before.card == name):
        return replace(before, vram=replace(before.vram, context=context)) if card and before.vram else before
    if apart:
        tell("measuring this machine")
        _measure_apart(where, threads, card)
        return cached_machine(where, threads, say, card)
    machine = before or measure_machine(threads, None, say, card=False)
    if where is not None and _lacks_disk(machine, where):
        machine = with_disk(machine, where, tell)
    if card and machine.card != name:
        machine = with_card(machine, tell)
    tell(f"machine: measured now, kept in {keep_machine(machine)} (`powerinfer machine` measures anew)")
    return machine


def _kept(threads: int) -> Machine | None:
    """What was measured before of this processor; None where that cannot be read."""
    try:
        machine = read_machine(machine_path(threads))
    except PowerinferError:
        return None
    return machine if machine.name == _processor() else None


def _lacks_disk(machine: Machine, where: Path | None) -> bool:
    return where is not None and machine.disk_device != where.stat().st_dev


def _measure_apart(where: Path | None, threads: int, card: bool) -> None:
    """Fills the cache from a process of its own. Where that fails this one will say why."""
    given = f"{None if where is None else str(where)!r}, {threads}, {card}"
    program = (
        "from pathlib import Path; from powerinfer_tools.placement import cached_machine; "
        f"where, threads, card = {given}; cached_machine(where and Path(where), threads, card=card)"
    )
    subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)


def keep_machine(machine: Machine) -> Path:
    """Writes what cached_machine answers from now on; says where."""
    path = machine_path(machine.threads)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_machine(machine, path, force=True)
    return path


def machine_path(threads: int) -> Path:
    """Where this machine's last measurement with so many threads is kept."""
    return cache_folder() / f"machine-{platform.node() or 'here'}-{threads}.json"


def cache_folder() -> Path:
    """Where this program keeps what it can make again: $POWERINFER_CACHE, else the user's cache folder."""
    if own := os.environ.get("POWERINFER_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "powerinfer"


def cores() -> int:
    """Physical cores that this process may use, as far as the system says; else its processors."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    siblings = {_first_sibling(processor) for processor in allowed}
    return max(1, len(siblings))


def _first_sibling(processor: int) -> str:
    path = Path(f"/sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list")
    return path.read_text().strip() if path.exists() else str(processor)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def measure_ram(threads: int, buffer_bytes: int = BUFFER_BYTES) -> Tier:
    """Memory as the engine reads weights there."""
    rows = tuple((size, measure_rows(threads, buffer_bytes, size, STRIDE_ROWS)) for size in ROW_BYTES)
    return Tier(_ram_bytes(), measure_rows(threads, buffer_bytes, MATRIX_ROW), rows)


def _ram_bytes() -> int:
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names:
        return 0
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def with_disk(machine: Machine, where: Path, tell: Callable[[str], None]) -> Machine:
    """The machine with the disk of this folder, measured now if there is room; where is a file: by reading it."""
    tell(f"measuring the disk of {where}")
    notes: list[str] = []
    disk = measure_file(where) if where.is_file() else _measure_disk(where, notes)
    device = where.stat().st_dev if disk is not None else 0
    return replace(machine, disk=disk, disk_device=device, notes=(*machine.notes, *notes))


def _measure_disk(folder: Path, notes: list[str]) -> Tier | None:
    """Reads a temporary file past the page cache, in sequence and in random places with several reads in flight."""
    n_bytes = shutil.disk_usage(folder).free
    if n_bytes < 2 * FILE_BYTES:
        notes.append(f"disk: not measured, {folder} has only {n_bytes} bytes free")
        return None
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".powerinfer-disk.") as file:
        block = np.random.default_rng(0).bytes(1 << 20)
        for _ in range(FILE_BYTES >> 20):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        if not _reads_past_cache(file.name):
            notes.append("disk: its file system offers no reads past the page cache; measured is the cache")
        notes.append("disk: the file was written just before; a cache of the host or the drive may flatter it")
        return replace(measure_file(Path(file.name)), n_bytes=n_bytes)


def _reads_past_cache(name: str) -> bool:
    try:
        os.close(os.open(name, os.O_RDONLY | getattr(os, "O_DIRECT", 0)))
    except OSError:
        return False
    return hasattr(os, "O_DIRECT")


def measure_file(path: Path) -> Tier:
    """The disk as the engine reads neurons from this file."""
    n_bytes = path.stat().st_size
    sizes = [size for size in READ_BYTES if size <= n_bytes // 2] or [4096]
    with path.open("rb") as file:
        rows = tuple(
            (size, measure_reads(file.fileno(), size, min(READS, LANDING_BYTES // size), SECONDS)) for size in sizes
        )
        latency = 4096 / measure_reads(file.fileno(), 4096, 1, SECONDS)
    return Tier(n_bytes, rows[-1][1], rows, latency)


def device() -> str:
    """The device that --vram means: the card, or what stands in for it in tests."""
    if (name := os.environ.get("POWERINFER_DEVICE", "cuda")) not in DEVICES:
        raise PowerinferError(f"POWERINFER_DEVICE: expected {' or '.join(DEVICES)}, found {name!r}", "usage")
    if name == "host":
        say_stand_in()
    return name


@cache
def say_stand_in() -> None:
    """Says once that no card is used."""
    print("POWERINFER_DEVICE=host: a thread stands in for the card; it is for tests", file=sys.stderr)


def with_card(machine: Machine, tell: Callable[[str], None]) -> Machine:
    """The machine with its card, measured now. Errors: there is none, or not what it needs."""
    name, n_bytes, free, context = describe_card(device())
    tell(f"measuring the card, {name}")
    buffer = max(BUFFER_BYTES, min(free // 4, CARD_BUFFER_BYTES) >> 20 << 20)

    def read(row_bytes: int, stride_rows: int) -> float:
        how = {"buffer_bytes": buffer, "row_bytes": row_bytes, "stride_rows": stride_rows}
        return measure_card("read", device(), **how)

    card = Tier(
        n_bytes,
        read(buffer, 1),
        tuple((size, read(size, STRIDE_ROWS)) for size in ROW_BYTES),
        measure_card("merge", device(), row_bytes=VECTOR_BYTES) / 2,
        measure_card("launch", device()),
        measure_card("copy", device()),
        context,
    )
    return replace(machine, vram=card, card=name)
