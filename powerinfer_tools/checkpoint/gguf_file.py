"""A GGUF file's header, bounds-checked: metadata, and where each tensor lies. No tensor data is read.

Strict is for our artifacts: rules, limits and error kinds are those of native/src/gguf.h. Otherwise a foreign
checkpoint: version 2 too, every tensor type that the gguf package knows, gaps between tensors and padding at the
end allowed. Either way every bound is checked before anything is allocated for it.
"""

import mmap
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from powerinfer_tools.errors import PowerinferError

# limits, equal to those of native/src/gguf.h
MAX_KV = 65536
MAX_TENSORS = 65536
MAX_KEY = 255  # bytes
MAX_NAME = 63  # bytes
MAX_STRING = 64 << 20  # bytes
MAX_ARRAY = 1 << 24  # elements
MAX_HEADER = 256 << 20  # bytes
MAX_DIMS = 4
MAX_ELEMENTS = (1 << 40) - 1  # of a tensor
MIN_ALIGNMENT, MAX_ALIGNMENT, DEFAULT_ALIGNMENT = 8, 4096, 32

GGUF, PWRI = b"GGUF", b"PWRI"  # what files begin with: those of the first PowerInfer say so

UINT32, BOOL, STRING, ARRAY, UINT64 = 4, 7, 8, 9, 10
_CODES = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    UINT32: "I",
    5: "i",
    6: "f",
    BOOL: "?",
    UINT64: "Q",
    11: "q",
    12: "d",
}
_SCALARS = {type: struct.Struct(f"<{code}") for type, code in _CODES.items()}
_LENGTH = struct.Struct("<Q")

# ggml's type id: (elements of a block, bytes of a block); F32, F16, Q4_0, Q8_0, I32
_ARTIFACT_TYPES = {0: (1, 4), 1: (1, 2), 2: (32, 18), 8: (32, 34), 26: (1, 4)}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: `type` is ggml's id, `shape` its ne (fastest first), `offset` counts in the file."""

    name: str
    type: int
    shape: tuple[int, ...]
    offset: int
    n_bytes: int

    @property
    def n_rows(self) -> int:
        """Rows of shape[0] elements."""
        return prod(self.shape[1:])


@dataclass(frozen=True)
class GgufFile:
    """A file's header. metadata: int, float, bool, str or a list of these; tensors: in the header's order."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    data_offset: int
    n_bytes: int


def read_gguf(path: Path, strict: bool, magic: bytes = GGUF) -> GgufFile:
    """The header of the GGUF file at `path`, which begins with `magic`.

    Errors, by kind. truncated: it ends too early; malformed: it breaks a rule of the format or a limit;
    unsupported: a version or tensor type that is not read; io: it cannot be read. Each names field or tensor, what
    was found and the limit. usage: there is no such file.
    """
    if not path.is_file():
        raise PowerinferError(f"{path}: expected a GGUF file, found no file", "usage")
    try:
        with path.open("rb") as file:
            n_bytes = file.seek(0, 2)
            if n_bytes == 0:  # cannot be mapped
                raise PowerinferError(f"{path}: expected a GGUF file, found the end at byte 0", "truncated")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data, strict, magic).read()
    except OSError as error:
        raise PowerinferError(f"{path}: cannot be read: {error.strerror or error}", "io") from error


def is_pwri(path: Path) -> bool:
    """Whether the file is a model of the first PowerInfer, by its first bytes."""
    with path.open("rb") as file:
        return file.read(len(PWRI)) == PWRI


def raw_rows(file: GgufFile, name: str, rows: slice | None = None) -> npt.NDArray[np.uint8]:
    """Rows of a tensor as stored, uint8 [rows, bytes of a row], from a memory map. Errors: no such tensor."""
    tensor = file.tensors.get(name)
    if tensor is None:
        raise PowerinferError(f"{file.path}: {name}: expected such a tensor, found none", "mismatch")
    shape = (tensor.n_rows, tensor.n_bytes // tensor.n_rows)
    try:
        mapped = np.memmap(file.path, np.uint8, "r", tensor.offset, shape)
    except (OSError, ValueError) as error:  # gone or cut since its header was read
        raise PowerinferError(f"{file.path}: {name}: cannot be read: {error}", "io") from error
    return mapped if rows is None else mapped[rows]


class _Reader:
    """Walks a mapped header once; never steps past the end of the file or past MAX_HEADER."""

    def __init__(self, path: Path, data: mmap.mmap, strict: bool, magic: bytes) -> None:
        self.path, self.data, self.strict, self.magic = path, data, strict, magic
        self.n_bytes = len(data)
        self.position = 0
        self.alignment = DEFAULT_ALIGNMENT
        self.types = _ARTIFACT_TYPES if strict else _foreign_types()

    def read(self) -> GgufFile:
        self.check_version()
        n_tensors = self.count("number of tensors", MAX_TENSORS)
        n_kv = self.count("number of metadata keys", MAX_KV)
        metadata: dict[str, Any] = {}
        for _ in range(n_kv):
            self.read_pair(metadata)
        tensors: dict[str, TensorInfo] = {}
        for _ in range(n_tensors):
            self.read_tensor(tensors)
        data_offset = self.align_up(self.position)
        located = {
            t.name: TensorInfo(t.name, t.type, t.shape, data_offset + t.offset, t.n_bytes) for t in tensors.values()
        }
        if self.strict:
            self.check_packed(located.values(), data_offset)
        else:
            self.check_disjoint(located.values())
        return GgufFile(self.path, metadata, located, data_offset, self.n_bytes)

    def check_version(self) -> None:
        self.require(4, "magic")
        found = self.data[:4]
        if found == PWRI != self.magic:
            found_is = "expected an artifact, found a model of the first PowerInfer"
            self.fail(f"{found_is}; convert it with: powerinfer build {self.path} -o NEW.gguf")
        if found != self.magic:
            self.fail(f"expected a {self.magic.decode()} file, found one that begins with {found!r}")
        self.position = 4
        version = self.number(UINT32, "version")
        if version not in ((3,) if self.strict else (2, 3)):
            wanted = "3" if self.strict else "2 or 3, little-endian"
            self.fail(f"version: expected {wanted}, found {version}", "unsupported")

    def read_pair(self, metadata: dict[str, Any]) -> None:
        key = self.name("key", MAX_KEY)
        if key in metadata:
            self.fail(f"{_shown(key)}: expected each key once, found it twice")
        is_alignment = key == "general.alignment"
        where = _shown(key)
        type = self.number(UINT32, where)
        if is_alignment and type != UINT32:
            self.fail(f"{where}: expected a value of type {UINT32} (uint32), found type {type}")
        metadata[key] = self.value(type, where)
        if is_alignment:
            self.alignment = self.checked_alignment(metadata[key])

    def checked_alignment(self, found: int) -> int:
        if not MIN_ALIGNMENT <= found <= MAX_ALIGNMENT or found & (found - 1):
            limits = f"{MIN_ALIGNMENT} to {MAX_ALIGNMENT}"
            self.fail(f"general.alignment: expected a power of two from {limits}, found {found}")
        return found

    def value(self, type: int, where: str) -> Any:
        if type == STRING:
            return self.string(where)
        if type == ARRAY:
            return self.array(where)
        if type not in _SCALARS:
            self.fail(f"{where}: expected a value type from 0 to 12, found {type}")
        return self.number(type, where)

    def array(self, where: str) -> list[Any]:
        type = self.number(UINT32, where)
        if type != STRING and type not in _SCALARS:
            self.fail(f"{where}: expected an array of scalars or strings, found elements of type {type}")
        n = self.count(f"{where}: number of elements", MAX_ARRAY)
        if type == STRING:
            return self.strings(n, where)
        size = n * _SCALARS[type].size
        self.require(size, where)
        stored = self.data[self.position : self.position + size]
        if type == BOOL and n and max(stored) > 1:
            self.fail(f"{where}: expected booleans of 0 or 1, found {max(stored)}")
        self.position += size
        values: list[Any] = np.frombuffer(stored, f"<{_CODES[type]}").tolist()
        return values

    def strings(self, n: int, where: str) -> list[str]:
        """n strings in one plain loop: vocabularies have 150 000."""
        self.require(8 * n, where)
        data, length_at, position = self.data, _LENGTH.unpack_from, self.position
        end = min(self.n_bytes, MAX_HEADER)
        values = []
        for _ in range(n):
            start = position + 8
            stop = start + length_at(data, position)[0] if start <= end else end + 1
            if stop > end or stop - start > MAX_STRING:
                break
            try:
                values.append(data[start:stop].decode())
            except UnicodeDecodeError:
                break
            position = stop
        self.position = position
        if len(values) < n:
            self.string(f"{where}[{len(values)}]")  # says what is wrong with it
        return values

    def read_tensor(self, tensors: dict[str, TensorInfo]) -> None:
        name = self.name("tensor name", MAX_NAME)
        where = _shown(name)
        if name in tensors:
            self.fail(f"{where}: expected each tensor once, found it twice")
        n_dims = self.number(UINT32, where)
        if not 1 <= n_dims <= MAX_DIMS:
            self.fail(f"{where}: expected 1 to {MAX_DIMS} dimensions, found {n_dims}")
        shape = tuple(self.number(UINT64, where) for _ in range(n_dims))
        if 0 in shape:
            self.fail(f"{where}: expected dimensions of at least 1, found shape {list(shape)}")
        if prod(shape) > MAX_ELEMENTS:
            self.fail(f"{where}: expected at most {MAX_ELEMENTS} elements, found shape {list(shape)}")
        type = self.number(UINT32, where)
        if type not in self.types:
            known = ", ".join(map(str, sorted(self.types)))
            self.fail(f"{where}: expected a tensor type of {known}, found type {type}", "unsupported")
        elements, size = self.types[type]
        if shape[0] % elements:
            self.fail(f"{where}: expected rows of a multiple of {elements} elements, found {shape[0]}")
        offset = self.number(UINT64, where)
        if offset % self.alignment:
            self.fail(f"{where}: expected an offset that is a multiple of {self.alignment}, found {offset}")
        tensors[name] = TensorInfo(name, type, shape, offset, prod(shape) // elements * size)

    def check_packed(self, tensors: Iterable[TensorInfo], data_offset: int) -> None:
        """One tensor after the other, nothing but padding between them, nothing behind the last."""
        end = data_offset
        for tensor in tensors:
            expected = self.align_up(end)
            if tensor.offset != expected:
                found = f"{'an overlap' if tensor.offset < expected else 'a hole'}: byte {tensor.offset}"
                self.fail(f"{_shown(tensor.name)}: expected data from byte {expected} on, found {found}")
            end = self.checked_end(tensor)
        if end > self.n_bytes:
            self.fail(f"expected padding up to byte {end}, found the end at byte {self.n_bytes}", "truncated")
        if end < self.n_bytes:
            self.fail(f"expected the end at byte {end}, found {self.n_bytes - end} bytes of trailing data")

    def check_disjoint(self, tensors: Iterable[TensorInfo]) -> None:
        """Every tensor inside the file, no two over each other."""
        end = 0
        for tensor in sorted(tensors, key=lambda t: t.offset):
            if tensor.offset < end:
                found = f"an overlap: byte {tensor.offset}"
                self.fail(f"{_shown(tensor.name)}: expected data from byte {end} on, found {found}")
            end = self.checked_end(tensor)

    def checked_end(self, tensor: TensorInfo) -> int:
        end = tensor.offset + tensor.n_bytes
        if end > self.n_bytes:
            where, found = _shown(tensor.name), f"the end of the file at byte {self.n_bytes}"
            self.fail(f"{where}: expected data up to byte {end}, found {found}", "truncated")
        return end

    def align_up(self, position: int) -> int:
        return -(-position // self.alignment) * self.alignment

    def count(self, what: str, limit: int) -> int:
        found: int = self.number(UINT64, what)
        if found > limit:
            self.fail(f"{what}: expected at most {limit}, found {found}")
        return found

    def number(self, type: int, what: str) -> Any:
        scalar = _SCALARS[type]
        self.require(scalar.size, what)
        if type == BOOL and self.data[self.position] > 1:
            self.fail(f"{what}: expected a boolean of 0 or 1, found {self.data[self.position]}")
        (value,) = scalar.unpack_from(self.data, self.position)
        self.position += scalar.size
        return value

    def string(self, what: str, limit: int = MAX_STRING) -> str:
        n = self.count(f"{what}: length", limit)
        self.require(n, what)
        start = self.position
        self.position += n
        try:
            return self.data[start : self.position].decode()
        except UnicodeDecodeError as error:
            found = f"byte {error.object[error.start]:#04x} at byte {start + error.start}"
            self.fail(f"{what}: expected UTF-8, found {found}")

    def name(self, what: str, limit: int) -> str:
        text = self.string(f"{what} at byte {self.position}", limit)
        if not text:
            self.fail(f"{what} at byte {self.position - 8}: expected 1 to {limit} bytes, found none")
        return text

    def require(self, n: int, what: str) -> None:
        """Fails unless the header has n more bytes."""
        if n > self.n_bytes - self.position:
            found = f"the end of the file at byte {self.n_bytes}"
            self.fail(f"{what}: expected {n} bytes at byte {self.position}, found {found}", "truncated")
        if n > MAX_HEADER - self.position:
            self.fail(f"{what}: expected a header of at most {MAX_HEADER} bytes, found {self.position + n}")

    def fail(self, message: str, kind: str = "malformed") -> NoReturn:
        raise PowerinferError(f"{self.path}: {message}", kind)


def _shown(text: str) -> str:
    """A name from the file, fit for one line of a terminal."""
    return text if text.isascii() and text.isprintable() else ascii(text)


def _foreign_types() -> dict[int, tuple[int, int]]:
    from gguf.constants import GGML_QUANT_SIZES

    return {int(type): sizes for type, sizes in GGML_QUANT_SIZES.items()}
