"""Files that are whole or absent: atomic writes, digests, locks, and the tables that stages hand to each other."""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from powerinfer_tools import __version__
from powerinfer_tools.errors import PowerinferError

Array = npt.NDArray[Any]


@contextmanager
def atomic_write(path: Path, force: bool = False) -> Iterator[IO[bytes]]:
    """Yields a binary file that becomes `path` when the block ends, whole and synced, or leaves no trace.

    Errors: `path` exists and not `force`; the folder cannot be written.
    """
    check_writable(path, force)
    target = path.resolve()  # a link keeps pointing where it points
    _remove_stale(target)
    fd, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=f".{os.getpid()}.tmp", dir=target.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask())
        os.replace(name, target)
        _sync_folder(target.parent)
    except OSError as error:
        Path(name).unlink(missing_ok=True)
        raise PowerinferError(f"{path}: cannot be written: {error.strerror or error}", "io") from error
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def check_writable(path: Path, force: bool) -> None:
    """Fails before hours of work, not after: the target exists without `force`, or its folder takes no files."""
    if path.exists() and not force:
        raise PowerinferError(f"{path} exists: use --force to replace it", "exists")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise PowerinferError(f"{path}: the folder {folder} does not exist", "usage")
    if not os.access(folder, os.W_OK):
        raise PowerinferError(f"{path}: the folder {folder} is read-only", "usage")


def _remove_stale(target: Path) -> None:
    for leftover in target.parent.glob(f".{target.name}.*.tmp"):
        pid = leftover.name.split(".")[-2]
        if not pid.isdigit() or not Path(f"/proc/{pid}").exists():
            leftover.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sha256_bytes(data: bytes) -> str:
    """The digest as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path, offset: int = 0) -> str:
    """The digest of a file from byte `offset` on."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(offset)
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def canonical_json(value: object) -> str:
    """The same value gives the same text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


FORMAT_VERSION = 1


@dataclass(frozen=True)
class Table:
    """Named arrays and a header: the form of .activations and .predictors files.

    header["kind"] says which; header["inputs"] maps each input's kind to its digest; `digest` is this file's own.
    """

    header: dict[str, Any]
    arrays: Mapping[str, Array]
    digest: str


_SAFETENSORS_TYPES = {"float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32", "uint8": "U8"}


def write_table(
    path: Path, kind: str, header: Mapping[str, Any], arrays: Mapping[str, Array], force: bool = False
) -> str:
    """Writes a safetensors file with our header, one array at a time; returns its digest.

    `arrays` is asked for each array twice (for its shape, then for its bytes), so it may read them lazily.
    """
    full = {"kind": kind, "format": FORMAT_VERSION, "tool": f"powerinfer {__version__}", **header}
    return write_safetensors(path, {"powerinfer": canonical_json(full)}, arrays, force)


def write_safetensors(path: Path, metadata: Mapping[str, str], arrays: Mapping[str, Array], force: bool = False) -> str:
    """Writes a safetensors file, one array at a time, each asked for twice; returns its digest."""
    index: dict[str, Any] = {"__metadata__": dict(metadata)}
    forms = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    names = sorted(forms, key=lambda name: (-forms[name][0].itemsize, name))  # keeps every array aligned
    end = 0
    for name in names:
        dtype, shape = forms[name]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        type = _SAFETENSORS_TYPES[dtype.name]
        index[name] = {"dtype": type, "shape": list(shape), "data_offsets": [begin, end]}
    text = canonical_json(index).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with atomic_write(path, force) as file:
        for chunk in (len(text).to_bytes(8, "little"), text):
            digest.update(chunk)
            file.write(chunk)
        for name in names:
            data = np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data
            digest.update(data)
            file.write(data)
    return digest.hexdigest()


def read_table(path: Path, kind: str) -> Table:
    """The table at `path`; arrays are loaded when asked for.

    Errors: not a safetensors file, not ours, of another kind, of a newer format: each names what was found.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise PowerinferError(f"{path}: no such file", "usage")
    try:
        with safe_open(path, framework="np") as file:
            text = (file.metadata() or {}).get("powerinfer")
            names = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise PowerinferError(f"{path}: expected a powerinfer {kind} file, found {error}", "malformed") from error
    if text is None:
        raise PowerinferError(
            f"{path}: expected a powerinfer {kind} file, found safetensors of another program", "mismatch"
        )
    header = json.loads(text)
    if header.get("kind") != kind:
        raise PowerinferError(f"{path}: expected a file of kind {kind}, found kind {header.get('kind')}", "mismatch")
    if header.get("format", 0) > FORMAT_VERSION:
        found = header["format"]
        raise PowerinferError(
            f"{path}: format {found} is newer than this program reads ({FORMAT_VERSION})", "unsupported"
        )
    return Table(header, _LazyArrays(path, names), sha256_file(path))


class _LazyArrays(Mapping[str, Array]):
    """Arrays of a safetensors file, read one at a time."""

    def __init__(self, path: Path, names: list[str]) -> None:
        self._path, self._names = path, names

    def __getitem__(self, name: str) -> Array:
        from safetensors import safe_open

        if name not in self._names:
            raise PowerinferError(f"{self._path}: expected the array {name}, found none", "mismatch")
        with safe_open(self._path, framework="np") as file:
            array: Array = file.get_tensor(name)
            return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def require_same(what: str, path: Path, expected: str, found: str, remedy: str) -> None:
    """Two digests must agree; the error names both and the command that makes the right file."""
    if expected != found:
        raise PowerinferError(
            f"{path}: made from another {what}: expected {expected[:12]}, found {found[:12]}; {remedy}",
            "mismatch",
        )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the file `path`.lock, so that two runs do not write one output; a dead process's lock is taken over."""
    lock = path.with_name(f".{path.name}.lock")
    try:
        fd = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        pid = lock.read_text().strip() or "?"
        if pid.isdigit() and Path(f"/proc/{pid}").exists():
            raise PowerinferError(f"{path}: process {pid} is writing it ({lock})", "exists") from None
        lock.unlink(missing_ok=True)
        fd = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    try:
        os.write(fd, str(os.getpid()).encode())
        os.close(fd)
        yield
    finally:
        lock.unlink(missing_ok=True)
