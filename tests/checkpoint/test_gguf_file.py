"""The reader of foreign GGUF files: what the gguf package writes comes back, and every bound is still checked."""

import os
import subprocess
import sys
from pathlib import Path

import gguf as gguf_package
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powerinfer_tools.checkpoint.gguf_file import GgufFile, raw_rows, read_gguf
from powerinfer_tools.errors import PowerinferError
from tests.gguf_bytes import CODES, F32, STRING, array, gguf, scalar, tensor, text, whole

Type = gguf_package.GGMLQuantizationType


def read(path: Path, content: bytes, strict: bool = False) -> GgufFile:
    path.write_bytes(content)
    return read_gguf(path, strict)


def refused(path: Path, content: bytes, kind: str, message: str) -> None:
    with pytest.raises(PowerinferError, match=message) as caught:
        read(path, content)
    assert caught.value.kind == kind


@pytest.mark.parametrize("strict", [True, False])
def test_values_come_back(tmp_path: Path, strict: bool) -> None:
    extremes = {0: 255, 1: -128, 2: 65535, 3: -32768, 4: 2**32 - 1, 5: -(2**31), 6: 0.5, 7: True}
    extremes |= {10: 2**64 - 1, 11: -(2**63), 12: -1e300}
    assert extremes.keys() == CODES.keys()
    pairs = [scalar(b"s%d" % t, t, value) for t, value in extremes.items()]
    pairs += [array(b"a%d" % t, t, [value, 0]) for t, value in extremes.items()]
    pairs += [text("größe".encode(), "日本\0".encode()), array(b"texts", STRING, [b"", b"a b"]), array(b"none", 4, [])]
    metadata = read(tmp_path / "m.gguf", gguf(pairs), strict).metadata
    for t, value in extremes.items():
        assert metadata.pop(f"s{t}") == value
        found = metadata.pop(f"a{t}")
        assert found == [value, 0]
        assert type(found[0]) is type(value), "Python's own types, none of numpy's"
    assert metadata == {"größe": "日本\0", "texts": ["", "a b"], "none": []}


@pytest.mark.parametrize("strict", [True, False])
def test_rows_come_back(tmp_path: Path, strict: bool) -> None:
    file = read(tmp_path / "m.gguf", whole(), strict)
    shapes = {name: raw_rows(file, name).shape for name in file.tensors}
    assert shapes == {"f32": (1, 12), "f16": (3, 10), "q8_0": (4, 68), "q4_0": (4, 18), "i32": (1, 28)}
    for name, info in file.tensors.items():
        rows, stored = raw_rows(file, name), (np.arange(info.n_bytes) % 251).astype(np.uint8)
        np.testing.assert_array_equal(rows.ravel(), stored)
        np.testing.assert_array_equal(raw_rows(file, name, slice(1, 3)), rows[1:3])
    assert file.n_bytes == file.tensors["i32"].offset + 28


def test_a_tensor_that_is_not_there(tmp_path: Path) -> None:
    file = read(tmp_path / "m.gguf", whole())
    with pytest.raises(PowerinferError, match=r"m\.gguf: none\.weight: expected such a tensor, found none") as caught:
        raw_rows(file, "none.weight")
    assert caught.value.kind == "mismatch"


def test_a_file_that_was_cut_since(tmp_path: Path) -> None:
    file = read(tmp_path / "m.gguf", whole())
    os.truncate(file.path, file.data_offset)
    with pytest.raises(PowerinferError, match=r"m\.gguf: i32: cannot be read"):
        raw_rows(file, "i32")


def test_every_type_of_the_gguf_package(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf_package.GGUFWriter(path, "llama")
    written = {}
    for kind, (elements, size) in gguf_package.GGML_QUANT_SIZES.items():
        data = np.random.default_rng(kind).integers(0, 256, (3, 2 * size), np.uint8)
        writer.add_tensor(kind.name, data, raw_dtype=kind)
        written[kind.name] = kind, (2 * elements, 3), data
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_gguf(path, strict=False)
    assert file.tensors.keys() == written.keys()
    for name, (kind, shape, data) in written.items():
        assert (file.tensors[name].type, file.tensors[name].shape) == (kind, shape)
        np.testing.assert_array_equal(raw_rows(file, name), data)
    assert read_gguf(path, strict=False).metadata == {"general.architecture": "llama"}


GAP = [tensor(b"b", (8,), F32, 96), tensor(b"a", (8,), F32, 0)]


@pytest.mark.parametrize(
    "content",
    [gguf(version=2), gguf([], GAP, bytes(128)), whole() + bytes(100), gguf([scalar(b"k", 0, 1)], alignment=1)],
    ids=["version 2", "a gap and falling order", "padding at the end", "no padding without tensors"],
)
def test_allowed_in_foreign_files_alone(tmp_path: Path, content: bytes) -> None:
    read(tmp_path / "m.gguf", content)
    with pytest.raises(PowerinferError):
        read_gguf(tmp_path / "m.gguf", strict=True)


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (b"", "truncated", "found the end at byte 0"),
        (gguf(version=1), "unsupported", "version: expected 2 or 3, little-endian, found 1"),
        (gguf(version=3 << 24), "unsupported", "version: expected 2 or 3, little-endian, found 50331648"),
        (gguf([], [tensor(b"t", (32,), 4)], bytes(20)), "unsupported", "t: expected a tensor type of .*, found type 4"),
        (gguf([], [tensor(b"t", (255,), Type.Q4_K)], bytes(144)), "malformed", "t: .*a multiple of 256 .*found 255"),
        (gguf([], [tensor(b"t", (8,))], bytes(31)), "truncated", "t: expected data up to byte 96, found .* byte 95"),
        (gguf([], GAP, bytes(127)), "truncated", "b: expected data up to byte"),
        (
            gguf([], [tensor(b"a", (16,)), tensor(b"b", (8,), F32, 32)], bytes(128)),
            "malformed",
            "b: expected data from byte 160 on, found an overlap: byte 128",
        ),
        (gguf([], [tensor(b"a", (8,)), tensor(b"b", (8,))], bytes(128)), "malformed", "b: .*an overlap"),
        (gguf([], [tensor(b"a", (8,), F32, 2**63)], bytes(32)), "truncated", "a: expected data up to byte 92233720"),
        (gguf([], [tensor(b"a", (8,), F32, 1)], bytes(64)), "malformed", "a: .*a multiple of 32, found 1"),
        (gguf(n_kv=2**64 - 1), "malformed", "number of metadata keys: expected at most 65536"),
    ],
)  # fmt: skip
def test_refused_in_foreign_files_too(tmp_path: Path, content: bytes, kind: str, message: str) -> None:
    refused(tmp_path / "m.gguf", content, kind, message)


def test_folders_and_missing_files(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.gguf"):
        with pytest.raises(PowerinferError, match="expected a GGUF file, found") as caught:
            read_gguf(path, strict=True)
        assert caught.value.kind == "usage"


def test_strict_reading_imports_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(whole())
    program = (
        "import sys; from pathlib import Path; from powerinfer_tools.checkpoint.gguf_file import read_gguf\n"
        "read_gguf(Path(sys.argv[1]), strict=True); sys.exit(bool({'gguf', 'torch'} & set(sys.modules)))"
    )
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", program, str(tmp_path / "m.gguf")]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": root}, check=True)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(whole()) - 1), st.binary(min_size=1, max_size=9)), min_size=1, max_size=4))
def test_damage_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, patches: list[tuple[int, bytes]]
) -> None:
    content = bytearray(whole())
    for at, patch in patches:
        content[at : at + len(patch)] = patch
    try:
        file = read(tmp_path_factory.getbasetemp() / "foreign.gguf", bytes(content))
    except PowerinferError:
        return
    for name, info in file.tensors.items():
        assert raw_rows(file, name).nbytes == info.n_bytes
