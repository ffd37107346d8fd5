"""Measures this machine: RAM through the native library, the disk by reading a file, a card through torch."""

import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from powerinfer_tools.placement.machine import Machine, Tier, read_machine, write_machine

BUFFER_BYTES = 256 << 20  # beyond every cache
ROW_BYTES = (1024, 2304, 4608, 9216, 18432)
STRIDE_ROWS = 10  # one row in ten: a typical active share
FILE_BYTES = 128 << 20
READ_BYTES = (4096, 8192, 16384, 65536, 1 << 20)
READS, LANDING_BYTES = 256, 16 << 20  # that one layer asks for, and where they arrive
SECONDS = 0.3  # of each disk measurement


def measure_machine(
    threads: int | None = None, folder: Path | None = None, say: Callable[[str], None] | None = None
) -> Machine:
    """The machine's tiers. folder: where the disk is measured (a temporary file); None: no disk is measured."""
    tell = say or (lambda text: None)
    threads = threads or cores()
    notes: list[str] = []
    tell(f"measuring ram, {threads} threads")
    ram = _measure_ram(threads)
    disk = None
    if folder is not None:
        tell(f"measuring the disk of {folder}")
        disk = _measure_disk(folder, notes)
    return Machine(_processor(), threads, ram, _measure_vram(notes), disk, tuple(notes))


def cached_machine(folder: Path, threads: int | None = None, say: Callable[[str], None] | None = None) -> Machine:
    """The last measurement of this processor with as many threads, or a new one, kept in the user's cache folder."""
    tell = say or (lambda text: None)
    threads = threads or cores()
    path = cache_folder() / f"machine-{platform.node() or 'here'}-{threads}.json"
    if path.is_file():
        machine = read_machine(path)
        if machine.name == _processor():
            tell(f"machine: measured before, {path} (`powerinfer machine -o FILE` measures anew)")
            return machine
    machine = measure_machine(threads, folder, say)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_machine(machine, path, force=True)
    tell(f"machine: measured now, kept in {path}")
    return machine


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


def _measure_ram(threads: int) -> Tier:
    from powerinfer_tools.engine.native import measure_memory

    rows = tuple((size, measure_memory(threads, BUFFER_BYTES, size, STRIDE_ROWS)) for size in ROW_BYTES)
    return Tier(_ram_bytes(), measure_memory(threads, BUFFER_BYTES), rows)


def _ram_bytes() -> int:
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names:
        return 0
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


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
    from powerinfer_tools.engine.native import measure_file as measure

    n_bytes = path.stat().st_size
    sizes = [size for size in READ_BYTES if size <= n_bytes // 2] or [4096]
    with path.open("rb") as file:
        rows = tuple((size, measure(file.fileno(), size, min(READS, LANDING_BYTES // size), SECONDS)) for size in sizes)
        latency = 4096 / measure(file.fileno(), 4096, 1, SECONDS)
    return Tier(n_bytes, rows[-1][1], rows, latency)


def _measure_vram(notes: list[str]) -> Tier | None:
    """The first card, through torch where that sees one; None where there is none."""
    if shutil.which("nvidia-smi") is None:
        notes.append("no card: nvidia-smi is not installed")
        return None
    found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    if found.returncode != 0 or "GPU" not in found.stdout:
        notes.append("no card: nvidia-smi lists none")
        return None
    import torch

    if not torch.cuda.is_available():
        notes.append("a card is there, but this torch is built without CUDA: it was not measured")
        return None
    return _measure_card()


def _measure_card() -> Tier:
    """Sums of a large buffer, of picked rows, and the time of handing a small vector over."""
    import torch as t  # heavy, and only here

    words = t.ones(1 << 28, dtype=t.float32, device="cuda")

    def speed(read: Callable[[], object], n_bytes: int) -> float:
        times = []
        for _ in range(7):
            t.cuda.synchronize()
            start = time.perf_counter()
            read()
            t.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return n_bytes / statistics.median(times)

    sequential = speed(lambda: words.sum(), 4 * words.numel())
    rows = []
    for size in ROW_BYTES:
        table = words[: words.numel() // (size // 4) * (size // 4)].view(-1, size // 4)[::STRIDE_ROWS]
        rows.append((size, speed(lambda table=table: table.sum(), 4 * table.numel())))  # type: ignore[misc]
    vector = t.zeros(4096)
    latency = 4 * vector.numel() / speed(lambda: vector.to("cuda"), 4 * vector.numel())
    return Tier(t.cuda.get_device_properties(0).total_memory, sequential, tuple(rows), latency)
