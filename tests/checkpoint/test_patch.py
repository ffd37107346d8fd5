"""A patch on its base is a checkpoint like any other, read lazily; what fits no base is refused in one line."""

import json
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from powerinfer_tools.checkpoint import Merged, open_checkpoint
from powerinfer_tools.checkpoint.patch import KIND, write_patch
from powerinfer_tools.describe import describe
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.files import write_table
from tests.tiny import make_llama

UP, DOWN, NORM = "blk.1.ffn_up.weight", "blk.0.ffn_down.weight", "blk.0.ffn_norm.weight"
Arrays = dict[str, np.ndarray]


def changes(n_embd: int = 64, n_ff: int = 160, rank: int = 4) -> Arrays:
    """Of tests.tiny's model: a patched up, a patched down and a new norm."""
    rng = np.random.default_rng(7)

    def draw(*shape: int) -> np.ndarray:
        return (0.1 * rng.standard_normal(shape)).astype(np.float16)

    factors = {f"{UP}.a": draw(n_ff, rank), f"{UP}.b": draw(rank, n_embd)}
    factors |= {f"{DOWN}.a": draw(n_embd, rank), f"{DOWN}.b": draw(rank, n_ff)}
    return factors | {NORM: 1 + draw(n_embd).astype(np.float32)}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_llama(tmp_path / "model", activation="silu")


@pytest.fixture
def patch(base: Path, tmp_path: Path) -> Path:
    path = tmp_path / "p.safetensors"
    write_patch(path, Merged(open_checkpoint(base), "silu", (0.1, 0.2), changes()))
    return path


def test_it_is_the_base_and_what_was_learnt(base: Path, patch: Path) -> None:
    plain, merged, learnt = open_checkpoint(base), open_checkpoint(base, patch=patch), changes()
    assert replace(merged.config, rope=None) == replace(plain.config, rope=None, thresholds=(0.1, 0.2))
    assert merged.names() == plain.names()
    for name in (UP, DOWN):
        a, b = (learnt[f"{name}.{part}"].astype(np.float32) for part in "ab")
        np.testing.assert_array_equal(merged.read(name), plain.read(name) + a @ b)
    np.testing.assert_array_equal(merged.read(NORM), learnt[NORM])
    np.testing.assert_array_equal(merged.read("blk.0.ffn_up.weight"), plain.read("blk.0.ffn_up.weight"))
    np.testing.assert_array_equal(merged.read(UP, slice(9, 20)), merged.read(UP)[9:20])


def test_its_digest_is_that_of_what_was_trained(base: Path, patch: Path, tmp_path: Path) -> None:
    trained = Merged(open_checkpoint(base), "silu", (0.1, 0.2), changes())
    merged = open_checkpoint(base, patch=patch)
    assert merged.digest() == trained.digest()
    assert merged.inputs == {"base": trained.base.digest(), "patch": describe(patch)["digest"]}
    assert trained.inputs == {"base": trained.base.digest()}
    assert open_checkpoint(base).inputs == {}
    others = [(0.1, 0.3), changes()], [(0.1, 0.2), changes() | {NORM: np.ones(64, np.float32)}]
    digests = {Merged(trained.base, "silu", *other).digest() for other in others}
    assert len(digests | {trained.digest(), trained.base.digest()}) == 4


def test_rows_are_merged_when_they_are_read(tmp_path: Path) -> None:
    """A model of 8 layers and a patch of all its rows: neither is held."""
    base = make_llama(tmp_path / "model", n_layer=8, n_embd=256, n_ff=1024, activation="silu")
    plain = open_checkpoint(base)
    learnt = {f"blk.{i}.ffn_up.weight": np.zeros((1024, 256), np.float32) for i in range(8)}
    write_patch(tmp_path / "p", Merged(plain, "silu", (0.1,) * 8, learnt))
    tracemalloc.start()
    merged = open_checkpoint(base, patch=tmp_path / "p")
    for i in range(8):
        merged.read(f"blk.{i}.ffn_up.weight", slice(0, 16))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * (1 << 20)  # a matrix takes 1 MiB, the patch 8


def test_the_patch_of_another_base(patch: Path, tmp_path: Path) -> None:
    other = make_llama(tmp_path / "other", activation="silu", seed=1)
    wanted, found = json.loads(header_of(patch))["inputs"]["checkpoint"], open_checkpoint(other).digest()
    message = f"made from another checkpoint: expected {wanted[:12]}, found {found[:12]}"
    with pytest.raises(PowerinferError, match=message):
        open_checkpoint(other, patch=patch)


def header_of(path: Path) -> str:
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    return str(json.loads(data[8 : 8 + n])["__metadata__"]["powerinfer"])


def without(name: str) -> Callable[[Arrays], Arrays]:
    return lambda arrays: {key: array for key, array in arrays.items() if key != name}


def with_(name: str, array: np.ndarray) -> Callable[[Arrays], Arrays]:
    return lambda arrays: arrays | {name: array}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(f"{UP}.b"), f"{UP}: expected a [160, 4], b [4, 64], found a [160, 4]"),
        (without(f"{UP}.a"), f"{UP}: expected a [160, 0], b [0, 64], found b [4, 64]"),
        (with_(f"{UP}.b", np.zeros((4, 63))), f"{UP}: expected a [160, 4], b [4, 64], found a [160, 4], b [4, 63]"),
        (with_(f"{UP}.a", np.zeros((64, 4))), f"{UP}: expected a [160, 4], b [4, 64], found a [64, 4], b [4, 64]"),
        (with_(f"{UP}.a", np.zeros(4)), f"{UP}: expected a [160, 0], b [0, 64], found a [4], b [4, 64]"),
        (with_(UP, np.zeros((160, 64))), f"{UP}: expected whole [160, 64], found whole [160, 64], a ["),
        (with_(NORM, np.zeros(63)), f"{NORM}: expected whole [64], found whole [63]"),
        (with_(f"{NORM}.a", np.zeros((64, 1))), f"{NORM}: expected whole [64], found whole [64], a [64, 1]"),
        (with_("blk.2.ffn_up.weight", np.zeros(1)), "found blk.2.ffn_up.weight"),
        (with_("", np.zeros(1)), "expected tensors of"),
        (with_(f"{UP}.a", np.full((160, 4), np.inf)), f"{UP}.a: expected finite weights, found inf at [0, 0]"),
        (with_(NORM, np.full(64, np.nan)), f"{NORM}: expected finite weights, found nan at [0]"),
    ],
)  # fmt: skip
def test_tensors_that_are_refused(base: Path, tmp_path: Path, change: Callable[[Arrays], Arrays], message: str) -> None:
    arrays = {name: array.astype(np.float32) for name, array in change(changes()).items()}
    path = tmp_path / "p.safetensors"
    write_patch(path, Merged(open_checkpoint(base), "silu", (0.1, 0.2), arrays))
    assert_refused(base, path, message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"thresholds": [0.1]}, "thresholds: expected 2 numbers, found 1"),
        ({"thresholds": [0.1, -0.1]}, "thresholds: expected numbers, not negative"),
        ({"thresholds": [0.1, True]}, "thresholds: expected numbers, not negative"),
        ({"thresholds": 0.1}, "thresholds: expected numbers, not negative"),
        ({"activation": "gelu"}, "activation: expected one of relu, relu2, fatrelu, drelu, silu, found 'gelu'"),
        ({"activation": None}, "activation: expected a string, found nothing"),
        ({"inputs": {}}, "inputs: expected the digest of a checkpoint, found {}"),
        ({"kind": "predictors"}, "expected a file of kind patch, found kind predictors"),
        ({"format": 2}, "format 2 is newer than this program reads"),
        ({"format": "new"}, "expected a header of powerinfer, found"),
    ],
)
def test_headers_that_are_refused(base: Path, tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    inputs = {"checkpoint": open_checkpoint(base).digest()}
    header = {"inputs": inputs, "model": "m", "activation": "silu", "thresholds": [0.1, 0.2]} | fields
    write_table(tmp_path / "p", KIND, header, changes())
    assert_refused(base, tmp_path / "p", message)


@pytest.mark.parametrize("n_bytes", [0, 7, 100, -1])
def test_a_file_that_was_cut(base: Path, patch: Path, n_bytes: int) -> None:
    patch.write_bytes(patch.read_bytes()[:n_bytes])
    assert_refused(base, patch, "expected a powerinfer patch file, found")


def test_what_is_no_patch(base: Path, patch: Path, tmp_path: Path) -> None:
    assert_refused(base, base / "model.safetensors", "found safetensors of another program")
    assert_refused(base, tmp_path / "missing", "no such file")
    old = header_of(patch)
    patch.write_bytes(patch.read_bytes().replace(json.dumps(old).encode(), json.dumps("[" + old[1:]).encode()))
    assert_refused(base, patch, "expected a header of powerinfer, found")


def assert_refused(base: Path, patch: Path, message: str) -> None:
    with pytest.raises(PowerinferError) as caught:
        open_checkpoint(base, patch=patch)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{patch}: ")


def test_a_type_that_is_not_read(base: Path, patch: Path) -> None:
    data = patch.read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + n].replace(b'"F16"', b'"BF16"').rstrip()
    patch.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + n :])
    assert_refused(base, patch, "expected one of F32, F16, I64, I32, U8, found BF16")
