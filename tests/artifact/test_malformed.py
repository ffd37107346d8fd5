"""Broken containers: both readers refuse them for the same reason, in one line, before they allocate anything."""

import os
import re
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powerinfer_tools.checkpoint import gguf_file
from powerinfer_tools.engine import native
from powerinfer_tools.errors import PowerinferError
from tests.gguf_bytes import (
    ARRAY,
    F16,
    F32,
    I32,
    Q4_0,
    Q8_0,
    STRING,
    array,
    every_tensor,
    every_value,
    gguf,
    pair,
    scalar,
    string,
    tensor,
    text,
    whole,
)

Read = Callable[[Path], object]


def read_python(path: Path) -> None:
    gguf_file.read_gguf(path, strict=True)


def read_native(path: Path) -> None:
    """The native check goes on to bind the model; a mismatch means that the container itself is whole."""
    try:
        native.check_artifact(path)
    except PowerinferError as error:
        if error.kind != "mismatch":
            raise


READERS: dict[str, Read] = {"python": read_python, "native": read_native}
UINT8, UINT32, INT32, BOOL, UINT64 = 0, 4, 5, 7, 10


@pytest.fixture(params=READERS)
def read(request: pytest.FixtureRequest) -> Read:
    return READERS[request.param]


def refused(read: Read, path: Path, kind: str) -> str:
    """The message with which the file is refused."""
    with pytest.raises(PowerinferError) as caught:
        read(path)
    message = str(caught.value)
    assert caught.value.kind == kind, message
    assert message.startswith(f"{path}: ")
    assert message.isprintable(), "one line, nothing that a terminal would obey"
    return message.removeprefix(f"{path}: ")


@pytest.fixture
def file(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(content: bytes) -> Path:
        path = tmp_path / "broken.gguf"
        path.write_bytes(content)
        return path

    return write


def with_tensors(*tensors: bytes, data: int = 0) -> bytes:
    return gguf([], tensors, bytes(data))


def aligned(alignment: int, *tensors: bytes, data: int) -> bytes:
    return gguf([scalar(b"general.alignment", UINT32, alignment)], tensors, bytes(data), alignment=alignment)


def test_whole_file_is_read(read: Read, file: Callable[[bytes], Path]) -> None:
    read(file(whole()))


def test_every_prefix_is_truncated(read: Read, file: Callable[[bytes], Path]) -> None:
    tensors, data = every_tensor()
    data += bytes(-len(data) % 32)
    content = gguf(every_value(), [*tensors, tensor(b"big", (4096,), F32, len(data))], data + bytes(16384))
    path = file(content)
    header = len(content) - len(data) - 16384
    for n in [*range(len(content) - 1, header, -97), *range(header, -1, -1)]:
        os.truncate(path, n)
        assert re.search(rf"\bbyte {n}\b", refused(read, path, "truncated"))


@pytest.mark.parametrize("tail", [b"\0", b"PK\5\6" + bytes(18)], ids=["one byte", "an empty ZIP"])
def test_trailing_data(read: Read, file: Callable[[bytes], Path], tail: bytes) -> None:
    assert f"found {len(tail)} bytes of trailing data" in refused(read, file(whole() + tail), "malformed")


HUGE = [2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]
COUNTS: dict[str, Callable[[int], bytes]] = {
    "number of metadata keys": lambda n: gguf(every_value(), n_kv=n),
    "number of tensors": lambda n: gguf(every_value(), n_tensors=n),
    "key at byte 24: length": lambda n: gguf([string(b"k", n)]),
    "k: length": lambda n: gguf([pair(b"k", STRING, string(b"v", n))]),
    "k: number of elements": lambda n: gguf([array(b"k", UINT8, [1, 2], n)]),
    "k[1]: length": lambda n: gguf([pair(b"k", ARRAY, struct.pack("<IQ", STRING, 2) + string(b"") + string(b"v", n))]),
    "tensor name at byte 24: length": lambda n: gguf([], [string(b"t", n)]),
}


@pytest.mark.parametrize("n", HUGE)
@pytest.mark.parametrize("field", COUNTS)
def test_huge_counts(read: Read, file: Callable[[bytes], Path], field: str, n: int) -> None:
    message = refused(read, file(COUNTS[field](n)), "malformed")
    assert re.fullmatch(rf"{re.escape(field)}: expected at most \d+, found {n}", message)


@pytest.mark.parametrize("n", HUGE)
@pytest.mark.parametrize("field", COUNTS)
def test_huge_counts_allocate_nothing(file: Callable[[bytes], Path], field: str, n: int) -> None:
    """The native reader's allocations are counted by native/tests/test_gguf.cpp."""
    path = file(COUNTS[field](n))
    tracemalloc.start()
    try:
        refused(READERS["python"], path, "malformed")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("n", [10 << 20, (64 << 20) + 1])
def test_a_long_token_takes_no_more_memory_than_itself(read: Read, file: Callable[[bytes], Path], n: int) -> None:
    """One of 10 MB is read; what uses the vocabulary refuses it."""
    key, tokens = b"tokenizer.ggml.tokens", [b"<s>", b"a" * n]
    strings = b"".join(struct.pack("<Q", len(token)) + token for token in tokens)
    path = file(gguf([pair(key, ARRAY, struct.pack("<IQ", STRING, len(tokens)) + strings)]))
    tracemalloc.start()
    try:
        if n <= gguf_file.MAX_STRING:
            read(path)
        else:
            assert f"{key.decode()}[1]: length: expected at most {gguf_file.MAX_STRING}" in refused(
                read, path, "malformed"
            )
        assert tracemalloc.get_traced_memory()[1] < 3 * (10 << 20)
    finally:
        tracemalloc.stop()


BROKEN: dict[str, tuple[bytes, str, str]] = {
    # header
    "magic": (gguf(magic=b"GGML"), "malformed", "expected a GGUF file, found one that begins with .*GGML"),
    "magic of control characters": (gguf(magic=b"\x1b[2J"), "malformed", "expected a GGUF file"),
    "version 2": (gguf(version=2), "unsupported", "version: expected 3, found 2"),
    "version 4": (gguf(version=4), "unsupported", "version: expected 3, found 4"),
    "big-endian": (gguf(version=3 << 24), "unsupported", "version: expected 3, found 50331648"),
    # shapes
    "no dimensions": (with_tensors(tensor(b"t", ())), "malformed", "t: expected 1 to 4 dimensions, found 0"),
    "five dimensions": (
        with_tensors(tensor(b"t", (1, 1, 1, 1, 1)), data=4),
        "malformed",
        "t: expected 1 to 4 dimensions, found 5",
    ),
    "2^32 - 1 dimensions": (
        gguf([], [string(b"t") + struct.pack("<I", 2**32 - 1)]),
        "malformed",
        "t: expected 1 to 4 dimensions, found 4294967295",
    ),
    "zero dimension": (with_tensors(tensor(b"t", (4, 0))), "malformed", "t: expected dimensions of at least 1"),
    "elements wrap to 0": (with_tensors(tensor(b"t", (2**33, 2**33))), "malformed", "t: .*8589934592"),
    "elements wrap to 4": (
        with_tensors(tensor(b"t", (2**62 + 1, 4)), data=16),
        "malformed",
        "t: .*4611686018427387905",
    ),
    "bytes wrap to 0": (with_tensors(tensor(b"t", (2**62,))), "malformed", "t: expected at most 1099511627775 el"),
    "2^40 elements": (with_tensors(tensor(b"t", (2**20, 2**20))), "malformed", "t: expected at most 1099511627775 el"),
    "2^40 - 1 elements": (
        with_tensors(tensor(b"t", (2**40 - 1,))),
        "truncated",
        "t: expected data up to byte 4398046511164",
    ),
    "padded size wraps": (
        with_tensors(tensor(b"a", (1,)), tensor(b"t", (1,), F32, 2**64 - 32), data=4),
        "malformed",
        "t: ",
    ),
    "sum of sizes wraps": (
        with_tensors(*(tensor(b"t%d" % i, (2**38,), F32, i << 40) for i in range(3)), data=4),
        "truncated",
        "t0: expected data up to byte 109951162",
    ),
    "cut block of Q4_0": (
        with_tensors(tensor(b"t", (33, 32), Q4_0), data=594),
        "malformed",
        "t: expected rows of a multiple of 32 elements, found 33",
    ),
    "cut block of Q8_0": (with_tensors(tensor(b"t", (16, 2), Q8_0), data=34), "malformed", "a multiple of 32 .*16"),
    "type of another program": (with_tensors(tensor(b"t", (32,), 3), data=20), "unsupported", "t: .*found type 3"),
    "type 2^32 - 1": (with_tensors(tensor(b"t", (32,), 2**32 - 1)), "unsupported", "t: .*found type 4294967295"),
    # places
    "overlap": (
        with_tensors(tensor(b"a", (16,)), tensor(b"b", (16,), F32, 32), data=96),
        "malformed",
        "b: expected data from byte 160 on, found an overlap: byte 128",
    ),
    "same place": (with_tensors(tensor(b"a", (8,)), tensor(b"b", (8,)), data=32), "malformed", "b: .*an overlap"),
    "hole": (
        with_tensors(tensor(b"a", (8,)), tensor(b"b", (8,), F32, 64), data=96),
        "malformed",
        "b: expected data from byte 128 on, found a hole: byte 160",
    ),
    "hole before the first": (with_tensors(tensor(b"a", (8,), F32, 32), data=64), "malformed", "a: .*a hole"),
    "falling order": (
        with_tensors(tensor(b"a", (8,), F32, 32), tensor(b"b", (8,), F32, 0), data=64),
        "malformed",
        "a: .*a hole",
    ),
    "unaligned": (with_tensors(tensor(b"a", (8,), I32, 4), data=36), "malformed", "a: .*a multiple of 32, found 4"),
    "past the end": (with_tensors(tensor(b"a", (8,), F32, 2**40), data=32), "malformed", "a: .*a hole"),
    "one byte short": (
        with_tensors(tensor(b"a", (8,), F16), data=15),
        "truncated",
        "a: expected data up to byte 80, found the end of the file at byte 79",
    ),
    "no padding": (gguf([scalar(b"k", UINT32, 1)], alignment=1), "truncated", "expected padding up to byte 64"),
    # names
    "duplicate key": (gguf([text(b"k", b""), scalar(b"k", BOOL, 1)]), "malformed", "k: expected each key once"),
    "duplicate tensor": (
        with_tensors(tensor(b"t", (8,)), tensor(b"t", (8,), F32, 32), data=64),
        "malformed",
        "t: expected each tensor once",
    ),
    "empty key": (gguf([text(b"", b"v")]), "malformed", "key at byte 24: expected 1 to 255 bytes, found none"),
    "key of 256 bytes": (gguf([text(b"k" * 256, b"v")]), "malformed", "key at byte 24: .*at most 255, found 256"),
    "key not UTF-8": (gguf([text(b"k\xff", b"v")]), "malformed", "key at byte 24: expected UTF-8"),
    "key cut in a character": (gguf([text(b"k\xe6\x97", b"v")]), "malformed", "key at byte 24: expected UTF-8"),
    "empty tensor name": (with_tensors(tensor(b"", (8,)), data=32), "malformed", "tensor name at byte 24: .*none"),
    "tensor name of 64 bytes": (with_tensors(tensor(b"t" * 64, (8,)), data=32), "malformed", "at most 63, found 64"),
    "tensor name not UTF-8": (with_tensors(tensor(b"\xc0\x80", (8,)), data=32), "malformed", "name .*expected UTF-8"),
    "name of control characters": (with_tensors(tensor(b"\x1b[2J\n", (0,))), "malformed", r"\\x1b\[2J.*at least 1"),
    # values
    "overlong string": (gguf([text(b"k", b"\xe0\x80\x80")]), "malformed", "k: expected UTF-8"),
    "surrogate": (gguf([text(b"k", b"\xed\xa0\x80")]), "malformed", "k: expected UTF-8"),
    "above U+10FFFF": (gguf([text(b"k", b"\xf4\x90\x80\x80")]), "malformed", "k: expected UTF-8"),
    "string of an array": (gguf([array(b"k", STRING, [b"", b"\x80"])]), "malformed", "k.*: expected UTF-8"),
    "value type 13": (gguf([pair(b"k", 13, bytes(8))]), "malformed", "k: expected a value type .*found 13"),
    "element type 13": (gguf([pair(b"k", ARRAY, struct.pack("<IQ", 13, 0))]), "malformed", "k: .*found elem.* 13"),
    "nested array": (gguf([pair(b"k", ARRAY, struct.pack("<IQ", ARRAY, 0))]), "malformed", "k: .*found elem.* 9"),
    "boolean 2": (gguf([pair(b"k", BOOL, b"\2")]), "malformed", "k: expected .* 0 or 1, found 2"),
    "boolean 255 in an array": (
        gguf([pair(b"k", ARRAY, struct.pack("<IQ", BOOL, 3) + b"\0\1\xff")]),
        "malformed",
        "k: expected booleans of 0 or 1, found 255",
    ),
    "array longer than the file": (gguf([array(b"k", UINT64, [], 2**24)]), "truncated", "k: expected 134217728 bytes"),
    "strings longer than the file": (gguf([array(b"k", STRING, [], 2**24)]), "truncated", "k: expected 134217728 by"),
    "string longer than the file": (gguf([pair(b"k", STRING, string(b"", 2**26))]), "truncated", "k: .*67108864 bytes"),
    "alignment of type int32": (gguf([scalar(b"general.alignment", INT32, 32)]), "malformed", "general.al.*type 5"),
    "alignment of type array": (gguf([array(b"general.alignment", UINT32, [32])]), "malformed", "general.al.*type 9"),
    **{
        f"alignment {n}": (gguf([scalar(b"general.alignment", UINT32, n)]), "malformed", f"general.al.*found {n}")
        for n in (0, 1, 3, 4, 48, 8192, 2**31, 2**32 - 1)
    },
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken(read: Read, file: Callable[[bytes], Path], case: str) -> None:
    content, kind, message = BROKEN[case]
    assert re.search(message, refused(read, file(content), kind))


ACCEPTED = {
    "no keys, no tensors": gguf(),
    "key of 255 bytes": gguf([text(b"k" * 255, b"")]),
    "tensor name of 63 bytes": with_tensors(tensor(b"t" * 63, (8,)), data=32),
    "four dimensions": with_tensors(tensor(b"t", (32, 1, 3, 2), Q8_0), data=204),
    "last tensor not padded": with_tensors(tensor(b"t", (1,)), data=4),
    "alignment 8": aligned(8, tensor(b"a", (1,)), tensor(b"b", (1,), F32, 8), data=12),
    "alignment 4096": aligned(4096, tensor(b"a", (1,)), data=4),
    "NUL in a key": gguf([text(b"a\0b", b"")]),
    "highest characters": gguf([text("ключ".encode(), "\ud7ff\ue000\uffff\U0010ffff".encode())]),
    "65536 keys": gguf([scalar(b"k%d" % i, UINT8, 1) for i in range(65536)]),
    "65536 tensors": gguf([], [tensor(b"t%d" % i, (8,), F32, 32 * i) for i in range(65536)], bytes(32 * 65536)),
}  # fmt: skip


@pytest.mark.parametrize("case", ACCEPTED)
def test_limits_are_inclusive(read: Read, file: Callable[[bytes], Path], case: str) -> None:
    read(file(ACCEPTED[case]))


@pytest.mark.slow
def test_longest_string(read: Read, file: Callable[[bytes], Path]) -> None:
    read(file(gguf([text(b"k", b"x" * (64 << 20))])))


@pytest.mark.slow
def test_longest_header(read: Read, file: Callable[[bytes], Path]) -> None:
    content = gguf([text(b"k%d" % i, bytes(60 << 20)) for i in range(5)])
    assert "k4: expected a header of at most 268435456 bytes" in refused(read, file(content), "malformed")


def test_limits_are_equal() -> None:
    header = (Path(__file__).parents[2] / "native/src/gguf.h").read_text()
    limits = {n: v for n, v in vars(gguf_file).items() if n.startswith(("MAX_", "MIN_", "DEFAULT_"))}
    assert len(limits) == 12
    for name, value in limits.items():
        (expression,) = re.findall(rf"\b{name} = ([^;,]+)[;,]", header)
        assert eval(expression.replace("ull", "")) == value, name


def verdict(read: Read, path: Path) -> str:
    """The kind of the refusal, "ok" for none; any other exception fails the test."""
    try:
        read(path)
    except PowerinferError as error:
        return error.kind if str(error).isprintable() else f"unprintable: {error}"
    return "ok"


INTERESTING = [struct.pack("<Q", n) for n in (0, 1, 8, 9, 2**16, 2**24, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)]
PATCHES = st.lists(
    st.tuples(st.integers(0, len(whole()) - 1), st.binary(min_size=1, max_size=4) | st.sampled_from(INTERESTING)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=500, deadline=None)
@given(patches=PATCHES, cut=st.integers(0, 40), tail=st.binary(max_size=4))
def test_readers_agree_on_damage(
    tmp_path_factory: pytest.TempPathFactory, patches: list[tuple[int, bytes]], cut: int, tail: bytes
) -> None:
    content = bytearray(whole())
    for at, patch in patches:
        content[at : at + len(patch)] = patch
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(bytes(content[: len(content) - cut]) + tail)
    assert verdict(READERS["python"], path) == verdict(READERS["native"], path)
