"""GGUF files as bytes, whole or with any one part a lie. Nothing here is checked: that is what the readers are for."""

import struct
from collections.abc import Sequence
from typing import Any

CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
F32, F16, Q4_0, Q8_0, I32 = 0, 1, 2, 8, 26


def string(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def pair(key: bytes, type: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", type) + value


def scalar(key: bytes, type: int, value: Any) -> bytes:
    return pair(key, type, struct.pack(f"<{CODES[type]}", value))


def text(key: bytes, value: bytes) -> bytes:
    return pair(key, STRING, string(value))


def array(key: bytes, type: int, values: Sequence[Any], count: int | None = None) -> bytes:
    elements = map(string, values) if type == STRING else (struct.pack(f"<{CODES[type]}", v) for v in values)
    head = struct.pack("<IQ", type, len(values) if count is None else count)
    return pair(key, ARRAY, head + b"".join(elements))


def tensor(name: bytes, shape: Sequence[int], type: int = F32, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, type, offset)


def gguf(
    pairs: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    alignment: int = 32,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_kv: int | None = None,
    n_tensors: int | None = None,
) -> bytes:
    """Header, padding, data. `alignment` pads the header; it is no key."""
    counts = (len(tensors) if n_tensors is None else n_tensors, len(pairs) if n_kv is None else n_kv)
    header = magic + struct.pack("<IQQ", version, *counts) + b"".join(pairs) + b"".join(tensors)
    return header + bytes(-len(header) % alignment) + data


def every_value() -> list[bytes]:
    """One key of each scalar type, a string, and an array of each."""
    pairs = [scalar(f"scalar.{t}".encode(), t, 1) for t in CODES]
    pairs += [array(f"array.{t}".encode(), t, [0, 1, 1]) for t in CODES]
    pairs += [text(b"text", "größer".encode()), array(b"texts", STRING, [b"", b"a", "日本".encode()])]
    return [*pairs, array(b"none", 4, []), scalar(b"general.alignment", 4, 32)]


def every_tensor() -> tuple[list[bytes], bytes]:
    """Tensors of each type and rank with their data, every gap to the next boundary of 32 bytes filled with zeros."""
    plans = [
        (b"f32", (3,), F32, 12),
        (b"f16", (5, 3), F16, 30),
        (b"q8_0", (64, 2, 2), Q8_0, 272),
        (b"q4_0", (32, 1, 2, 2), Q4_0, 72),
        (b"i32", (7,), I32, 28),
    ]
    infos, data = [], b""
    for name, shape, type, n_bytes in plans:
        data += bytes(-len(data) % 32)
        infos.append(tensor(name, shape, type, len(data)))
        data += bytes(i % 251 for i in range(n_bytes))
    return infos, data


def whole() -> bytes:
    """A valid file with every value type and every tensor type."""
    tensors, data = every_tensor()
    return gguf(every_value(), tensors, data)
