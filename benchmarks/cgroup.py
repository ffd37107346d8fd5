"""A limit of memory for one program: a cgroup of its own, page cache counted, without swap."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Limited:
    """What a program printed under a limit, the seconds it took, and the most memory that its cgroup held."""

    output: str
    seconds: float
    peak_bytes: int | None


@contextmanager
def cgroup(n_bytes: int) -> Iterator[Path | None]:
    """A new cgroup limited to so many bytes; None, and a word about it, where none may be made."""
    first = ROOT / "memory" if (ROOT / "memory").is_dir() else ROOT
    v1 = first != ROOT
    folder = first / f"powerinfer-{os.getpid()}"
    try:
        if not v1 and "memory" not in (ROOT / "cgroup.subtree_control").read_text():
            (ROOT / "cgroup.subtree_control").write_text("+memory")
        folder.mkdir()
        (folder / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(str(n_bytes))
        if v1:
            (folder / "memory.swappiness").write_text("0")
        else:
            (folder / "memory.swap.max").write_text("0")
    except OSError as error:
        print(f"no cgroup of {n_bytes} bytes ({error}): nothing but our own count keeps the limit", file=sys.stderr)
        if folder.is_dir():
            folder.rmdir()
        yield None
        return
    try:
        yield folder
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    for _ in range(50):  # the kernel takes a moment to let the last process go
        try:
            folder.rmdir()
            return
        except OSError:
            time.sleep(0.1)


def run_limited(words: list[str], n_bytes: int) -> Limited:
    """Runs a program within n_bytes. Fails where it fails."""
    with cgroup(n_bytes) as folder, tempfile.TemporaryFile("w+") as errors:
        if folder is not None:
            words = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(folder / "cgroup.procs"), *words]
        start = time.monotonic()
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=errors, text=True, check=False)
        seconds = time.monotonic() - start
        if done.returncode:
            errors.seek(0)
            raise SystemExit(f"{' '.join(words)}: exit status {done.returncode}\n{errors.read()[-1000:]}")
        return Limited(done.stdout, seconds, None if folder is None else _peak(folder))


def _peak(folder: Path) -> int | None:
    for name in ("memory.max_usage_in_bytes", "memory.peak"):
        if (folder / name).exists():
            return int((folder / name).read_text())
    return None
