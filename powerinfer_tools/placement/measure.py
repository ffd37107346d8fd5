"""Measures this machine: RAM through the native library, the disk by reading a file, a card through torch."""

import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from mmap import mmap
from pathlib import Path

import numpy as np

from powerinfer_tools.placement.machine import Machine, Tier, read_machine, write_machine

BUFFER_BYTES = 256 << 20  # beyond every cache
ROW_BYTES = (1024, 2304, 4608, 9216, 18432)
STRIDE_ROWS = 10  # one row in ten: a typical active share
FILE_BYTES = 128 << 20
READ_BYTES = (4096, 16384, 65536, 1 << 20)
IN_FLIGHT = 16  # reads
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
        fd = _open_past_cache(file.name, notes)
        try:
            sequential = _read_speed(fd, 1 << 20, 4, shuffled=False)
            rows = tuple((size, _read_speed(fd, size, IN_FLIGHT)) for size in READ_BYTES)
            latency = statistics.median(_read_times(fd, 4096, 200))
        finally:
            os.close(fd)
    notes.append("disk: the file was written just before; a cache of the host or the drive may flatter it")
    return Tier(n_bytes, sequential, rows, latency)


def measure_file(path: Path) -> Tier:
    """The disk as it reads this file, past the page cache."""
    n_bytes = path.stat().st_size
    fd = _open_past_cache(str(path), [])
    try:
        sizes = [size for size in READ_BYTES if size <= n_bytes // 2] or [4096]
        rows = tuple((size, _read_speed(fd, size, IN_FLIGHT, n_bytes=n_bytes)) for size in sizes)
        return Tier(n_bytes, rows[-1][1], rows, statistics.median(_read_times(fd, 4096, 200, n_bytes)))
    finally:
        os.close(fd)


def _open_past_cache(name: str, notes: list[str]) -> int:
    try:
        return os.open(name, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    except OSError:
        notes.append("disk: its file system offers no reads past the page cache; measured is the cache")
        return os.open(name, os.O_RDONLY)


def _read_speed(fd: int, size: int, in_flight: int, shuffled: bool = True, n_bytes: int = FILE_BYTES) -> float:
    """Bytes per second of reads of `size` bytes, by `in_flight` threads, each with its own share of the places."""
    places = np.arange(0, max(n_bytes - size, 0) + 1, size)
    if shuffled:
        places = np.random.default_rng(size).permutation(places)
    shares = [places[i::in_flight].tolist() for i in range(in_flight)]
    with ThreadPoolExecutor(in_flight) as pool:
        start = time.perf_counter()
        n_reads = sum(pool.map(lambda share: _read_until(fd, size, share, start + SECONDS), shares))
        return n_reads * size / (time.perf_counter() - start)


def _read_until(fd: int, size: int, places: Sequence[int], end: float) -> int:
    with mmap(-1, size) as buffer:  # page-aligned, as reads past the cache ask
        for done, place in enumerate(cycle(places), 1):
            os.preadv(fd, [buffer], place)
            if time.perf_counter() >= end:
                return done
    return 0


def _read_times(fd: int, size: int, n: int, n_bytes: int = FILE_BYTES) -> list[float]:
    places = np.random.default_rng(1).integers(0, max(n_bytes // size, 1), n) * size
    times = []
    with mmap(-1, size) as buffer:
        for place in places.tolist():
            start = time.perf_counter()
            os.preadv(fd, [buffer], place)
            times.append(time.perf_counter() - start)
    return times


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
