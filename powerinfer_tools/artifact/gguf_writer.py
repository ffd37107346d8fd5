"""Writes the container: GGUF version 3, tensors in order, each on an alignment boundary, nothing after the last.

The gguf package's writer collects tensors before it writes any and pads the last one; here the header is known before
the first tensor is read, so tensors stream, and a digest of all data is patched into the header at the end.
"""

import hashlib
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from powerinfer_tools.artifact.layout import ALIGNMENT, KEY_DATA_SHA256, TYPE_ID, TensorPlan
from powerinfer_tools.checkpoint.gguf_file import GGUF
from powerinfer_tools.errors import PowerinferError

Array = npt.NDArray[Any]
Value = bool | int | float | str | Sequence[str] | Array
"""The Python type says which GGUF type is written: bool, uint32, float32, string, and arrays of strings or numbers."""

_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
_DIGEST_LENGTH = 64  # hexadecimal digits of a SHA-256


def write_gguf(
    file: IO[bytes],
    metadata: Mapping[str, Value],
    tensors: Sequence[TensorPlan],
    blocks: Iterable[Iterator[Array]],
    magic: bytes = GGUF,
) -> str:
    """Writes header and tensors; `blocks` yields, tensor by tensor, the arrays whose bytes follow each other.

    Returns the SHA-256 of the tensor data, which the file holds too (layout.KEY_DATA_SHA256, its last key).
    """
    values = pack_values({**metadata, KEY_DATA_SHA256: "0" * _DIGEST_LENGTH})
    n_values = len(metadata) + 1
    header = magic + struct.pack("<IQQ", 3, len(tensors), n_values) + values
    digest_at = len(header) - _DIGEST_LENGTH
    header += pack_tensors(tensors)
    file.write(header + bytes(padding(len(header))))
    digest = _write_tensors(file, tensors, blocks)
    end = file.tell()
    file.seek(digest_at)
    file.write(digest.encode())
    file.seek(end)
    return digest


def header_bytes(metadata: Mapping[str, Value], tensors: Sequence[TensorPlan]) -> int:
    """The file's bytes before its first tensor."""
    size = 24 + len(pack_values({**metadata, KEY_DATA_SHA256: "0" * _DIGEST_LENGTH})) + len(pack_tensors(tensors))
    return size + padding(size)


def padding(n_bytes: int) -> int:
    """Bytes from `n_bytes` to the next alignment boundary."""
    return -n_bytes % ALIGNMENT


def offsets(tensors: Sequence[TensorPlan]) -> list[int]:
    """Where each tensor begins, and after the last entry where the data end, from the start of the data."""
    at, starts = 0, []
    for plan in tensors:
        at += padding(at)
        starts.append(at)
        at += plan.n_bytes
    return [*starts, at]


def pack_values(values: Mapping[str, Value]) -> bytes:
    """Keys and values as GGUF stores them, in order."""
    return b"".join(_string(key) + _typed(value) for key, value in values.items())


def pack_tensors(tensors: Sequence[TensorPlan]) -> bytes:
    """Names, shapes, types and offsets of tensors as GGUF stores them."""
    return b"".join(
        _string(plan.name)
        + struct.pack(f"<I{len(plan.shape)}Q", len(plan.shape), *plan.shape)
        + struct.pack("<IQ", TYPE_ID[plan.type], offset)
        for plan, offset in zip(tensors, offsets(tensors), strict=False)
    )


def _write_tensors(file: IO[bytes], tensors: Sequence[TensorPlan], blocks: Iterable[Iterator[Array]]) -> str:
    digest, at = hashlib.sha256(), 0
    for plan, start, parts in zip(tensors, offsets(tensors), blocks, strict=False):
        for part in chain([np.zeros(start - at, np.uint8)], parts):
            data = np.ascontiguousarray(part).data
            file.write(data)
            digest.update(data)
            at += part.nbytes
        if at != start + plan.n_bytes:
            raise PowerinferError(f"{plan.name}: expected {plan.n_bytes} bytes, found {at - start}", "internal")
    return digest.hexdigest()


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _typed(value: Value) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, np.ndarray):
        element = {np.dtype("<i4"): _INT32, np.dtype("<f4"): _FLOAT32}[value.dtype]
        return struct.pack("<IIQ", _ARRAY, element, len(value)) + value.tobytes()
    return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_string, value))
