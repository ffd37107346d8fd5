"""The program on files of the first PowerInfer: one line says how to convert, and converting leads to tokens."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Result
from tests.pwri import Model, write_counts

Program = Callable[..., Result]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return Model(threshold=0.25).write(tmp_path / "old.powerinfer.gguf")


@pytest.mark.parametrize("command", ["chat", "generate -p hi", "bench", "eval --corpus text.txt"])
def test_what_runs_artifacts_says_how_to_convert(powerinfer: Program, old: Path, command: str) -> None:
    (old.parent / "text.txt").write_text("the heat")
    name, *flags = command.split()
    found = powerinfer(name, old, *flags)
    assert found.code == 1
    assert found.err.count("\n") == 1
    assert f"powerinfer build {old} -o NEW.gguf" in found.err


def test_inspect_lists_it_and_says_how_to_convert(powerinfer: Program, old: Path) -> None:
    found = json.loads(powerinfer("inspect", old, "--json").out)
    assert found["arch"] == "llama"
    assert f"powerinfer build {old} -o NEW.gguf" in found["convert"]


@pytest.mark.slow
def test_it_is_converted_and_runs_and_goes_back(powerinfer: Program, old: Path) -> None:
    write_counts(old.parent / "activation")
    (old.parent / "old.powerinfer.gguf.generated.gpuidx").write_bytes(b"PWRI")
    built = powerinfer("build", old, "--keep", "-o", "new.gguf")
    assert built.code == 0, built.err
    assert "note: its .gpuidx file is not needed" in built.err
    assert "quant auto: f16" in built.err
    answer = powerinfer("generate", "new.gguf", "-p", "the heat", "-n", 4, "--temp", 0, "--json")
    assert answer.code == 0, answer.err
    assert 0 < json.loads(answer.out)["active_ratio"] < 1
    (old.parent / "out").mkdir()
    files = ("--activations", "new.activations", "--predictors", "new.predictors")
    back = powerinfer("split", old, *files, "--format", "powerinfer", "--quant", "f16", "-o", "out/back.gguf", "--json")
    assert json.loads(back.out)["bytes"] == (old.parent / "out/back.gguf").stat().st_size
    assert back.code == 0, back.err
    assert (old.parent / "out" / "back.gguf").read_bytes()[:4] == b"PWRI"


def test_nothing_to_count_by_costs_one_line(powerinfer: Program, old: Path) -> None:
    found = powerinfer("build", old, "-o", "new.gguf")
    assert found.code == 2
    assert found.err.count("\n") == 1
    assert "--corpus FILE" in found.err
    assert "--counts FOLDER" in found.err


def test_the_way_back_needs_predictors(powerinfer: Program, old: Path) -> None:
    write_counts(old.parent / "activation")
    powerinfer("build", old, "--keep", "-o", "new.gguf")
    found = powerinfer("split", old, "--activations", "new.activations", "--format", "powerinfer", "-o", "back.gguf")
    assert found.code == 2
    assert "--format powerinfer: expected --predictors FILE, found none" in found.err
