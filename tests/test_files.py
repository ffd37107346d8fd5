"""Files that stages hand to each other: whole or absent, of the right kind, locked while they are written."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from powerinfer_tools.activations import read_activations
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.files import atomic_write, locked, read_table, write_table
from powerinfer_tools.predictors import read_predictors

ARRAYS = {"counts.0": np.arange(5, dtype=np.int64), "inputs.0": np.ones((2, 3), np.float16)}


def test_tables_round_trip_and_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    digest = write_table(first, "activations", {"n": 1}, ARRAYS)
    assert write_table(second, "activations", {"n": 1}, ARRAYS) == digest
    assert first.read_bytes() == second.read_bytes()
    table = read_table(first, "activations")
    assert table.digest == digest
    assert table.header["n"] == 1
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(table.arrays[name], array)


def test_wrong_kinds_are_named(tmp_path: Path) -> None:
    write_table(tmp_path / "x.activations", "activations", {}, ARRAYS)
    with pytest.raises(
        PowerinferError, match=r"x\.activations: expected a file of kind predictors, found kind activations"
    ):
        read_predictors(tmp_path / "x.activations")
    save_file({"w": np.ones(3, np.float32)}, tmp_path / "foreign")
    with pytest.raises(PowerinferError, match="foreign: expected a powerinfer activations file, found safetensors of"):
        read_activations(tmp_path / "foreign")
    (tmp_path / "text").write_text("no table at all")
    with pytest.raises(PowerinferError, match="text: expected a powerinfer activations file"):
        read_activations(tmp_path / "text")
    with pytest.raises(PowerinferError, match="none: no such file"):
        read_activations(tmp_path / "none")


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    header = {"kind": "activations", "format": 2}
    save_file({"w": np.ones(3, np.float32)}, tmp_path / "x", {"powerinfer": json.dumps(header)})
    with pytest.raises(PowerinferError, match=r"format 2 is newer than this program reads \(1\)"):
        read_activations(tmp_path / "x")


def test_a_table_that_ends_early_is_refused(tmp_path: Path) -> None:
    write_table(tmp_path / "x", "activations", {}, ARRAYS)
    data = (tmp_path / "x").read_bytes()
    for n in (0, 7, 8, 40, len(data) - 1):
        (tmp_path / "cut").write_bytes(data[:n])
        with pytest.raises(PowerinferError, match="cut: expected a powerinfer activations file"):
            read_table(tmp_path / "cut", "activations")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "x"
    target.write_text("old")

    def write_and_fail() -> None:
        with atomic_write(target, force=True) as file:
            file.write(b"new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_and_fail()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]
    with pytest.raises(PowerinferError, match="x exists: use --force"), atomic_write(target):
        pass


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    (tmp_path / f".x.abc.{ended.pid}.tmp").write_text("half")
    with atomic_write(tmp_path / "x") as file:
        file.write(b"whole")
    assert os.listdir(tmp_path) == ["x"]


def test_a_link_keeps_pointing_where_it_points(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with atomic_write(tmp_path / "link", force=True) as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_one_writer_at_a_time_and_a_dead_one_holds_nothing(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    (tmp_path / ".x.lock").write_text(str(ended.pid))
    again = pytest.raises(PowerinferError, match=f"process {os.getpid()} is writing it")
    with locked(tmp_path / "x"), again, locked(tmp_path / "x"):
        pass
    assert not (tmp_path / ".x.lock").exists()
