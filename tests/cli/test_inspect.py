"""`powerinfer inspect` on each kind of file, whole and damaged."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from powerinfer_tools.files import write_table
from tests.artifacts import make_artifact
from tests.cli.conftest import Result
from tests.tiny import TEMPLATE, make_llama
from tests.tiny_families import make_nanochat

Program = Callable[..., Result]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in model/ and its artifact model.gguf."""
    folder = tmp_path_factory.mktemp("inspect")
    make_llama(folder / "model")
    make_artifact(folder / "model", folder / "model.gguf", predictor=True, rank=8, always=3)
    return folder


def write_activations(path: Path, counts: list[int]) -> None:
    """One layer, two samples."""
    header = {"inputs": {"checkpoint": "c" * 64}, "n_layer": 1, "n_embd": 4, "n_ff": len(counts), "n_tokens": 10}
    header |= {"n_samples": 2, "window": 4, "thresholds": [0.0]}
    arrays = {
        "counts.0": np.array(counts, np.int64),
        "inputs.0": np.zeros((2, 4), np.float16),
        "active.0": np.zeros((2, 1), np.uint8),
        "positions": np.arange(2),
    }
    write_table(path, "activations", header, arrays)


def test_an_artifact(powerinfer: Program, folder: Path) -> None:
    result = powerinfer("inspect", folder / "model.gguf", "--json")
    document = json.loads(result.out)
    assert (document["kind"], document["n_layer"], document["quant"]) == ("artifact", 2, "f32")
    assert document["bytes"] == (folder / "model.gguf").stat().st_size
    assert document["verified"] is False
    layer = document["layers"][1]
    assert (layer["layer"], layer["mode"], layer["rank"], layer["always"]) == (1, "predictor", 8, 3)
    assert (layer["vram"], layer["ram"], layer["disk"]) == (0, document["n_ff"], 0)
    assert sum(document["part_bytes"].values()) < document["bytes"]
    assert document["provenance"]["inputs"]["activations"] == "a" * 64


def test_what_a_model_has_that_a_plain_one_has_not(powerinfer: Program, folder: Path, tmp_path: Path) -> None:
    plain = json.loads(powerinfer("inspect", folder / "model.gguf", "--json").out)
    nanochat = json.loads(powerinfer("inspect", make_nanochat(tmp_path / "nanochat"), "--json").out)
    assert {"qk_norm", "softcap", "norm", "experts"} & plain.keys() == set()
    assert (nanochat["qk_norm"], nanochat["softcap"], "norm" in nanochat) == (True, 15.0, False)


def test_an_artifact_for_people(powerinfer: Program, folder: Path) -> None:
    result = powerinfer("inspect", folder / "model.gguf")
    assert result.code == 0
    assert result.err == ""
    assert "predictor" in result.out
    assert "chat_template  yes" in result.out


def test_verify_finds_one_changed_byte(powerinfer: Program, folder: Path, tmp_path: Path) -> None:
    data = bytearray((folder / "model.gguf").read_bytes())
    whole = powerinfer("inspect", folder / "model.gguf", "--verify", "--json")
    assert json.loads(whole.out)["verified"] is True
    data[-1] ^= 1
    (tmp_path / "bad.gguf").write_bytes(data)
    assert powerinfer("inspect", tmp_path / "bad.gguf").code == 0
    result = powerinfer("inspect", tmp_path / "bad.gguf", "--verify", "-q")
    assert result.code == 1
    assert "tensor data: expected SHA-256" in result.err
    assert result.err.count("\n") == 1


def test_the_template_is_shown_and_not_rendered(powerinfer: Program, folder: Path) -> None:
    for name in ("model.gguf", "model"):
        assert powerinfer("inspect", folder / name, "--template").out == TEMPLATE + "\n"


def test_a_checkpoint(powerinfer: Program, folder: Path) -> None:
    plain = json.loads(powerinfer("inspect", folder / "model", "--json").out)
    assert (plain["kind"], plain["activation"], plain["digest"]) == ("checkpoint", "relu", None)
    read = json.loads(powerinfer("inspect", folder / "model", "--json", "--verify").out)
    assert len(read["digest"]) == 64


def test_activations(powerinfer: Program, tmp_path: Path) -> None:
    write_activations(tmp_path / "a", [10, 0, 5, 5])
    document = json.loads(powerinfer("inspect", "a", "--verify", "--json").out)
    assert (document["kind"], document["tokens"], document["active_share"]) == ("activations", 10, 0.5)
    assert document["inputs"] == {"checkpoint": "c" * 64}
    write_activations(tmp_path / "b", [11, 0, 5, 5])
    result = powerinfer("inspect", "b", "--verify", "-q")
    assert (result.code, result.out) == (1, "")
    assert "layer 0: expected 4 counts in 0 .. 10" in result.err


def test_a_machine(powerinfer: Program, tmp_path: Path) -> None:
    from powerinfer_tools.placement.machine import Machine, Tier, write_machine

    write_machine(Machine("test", 2, Tier(1 << 30, 3e10, ((2304, 1e10),))), tmp_path / "m")
    document = json.loads(powerinfer("inspect", "m", "--json").out)
    assert (document["kind"], document["threads"]) == ("machine", 2)
    assert powerinfer("inspect", "m").code == 0


def test_what_machine_measures_is_what_is_planned_with(
    powerinfer: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from powerinfer_tools.placement import cached_machine, measure
    from powerinfer_tools.placement.machine import Machine, Tier

    monkeypatch.setenv("POWERINFER_CACHE", str(tmp_path / "cache"))
    measured = Machine(measure._processor(), 2, Tier(1 << 30, 3e10, ((2304, 1e10),)))
    monkeypatch.setattr("powerinfer_tools.placement.measure_machine", lambda *_: measured)
    result = powerinfer("machine", "-t", 2)
    assert result.code == 0
    assert str(measure.machine_path(2)) in result.err.replace("\n", "")
    assert cached_machine(None, 2) == measured


def test_a_placement(powerinfer: Program, tmp_path: Path) -> None:
    from powerinfer_tools.placement import Placement, write_placement

    values = {
        "vram": [10, 0],
        "ram": [90, 100],
        "dense": [True, False],
        "head": False,
        "n_ff": 100,
        "objective": "time",
        "quant": "f32",
        "ctx_size": 64,
        "expected_ms": 1.5,
        "impact": 2.0,
        "bound": 1.2,
        "gap": 0.25,
        "budgets": {"vram": 1, "ram": None},
        "n_bytes": {"ram": 5},
        "hits": {"ram": 0.5},
        "inputs": {"activations": "a"},
    }
    write_placement(Placement(**values), tmp_path / "p")
    document = json.loads(powerinfer("inspect", "p", "--json").out)
    assert document["layers"][0] == {"layer": 0, "vram": 10, "ram": 80, "disk": 10, "dense_in_vram": True}
    assert powerinfer("inspect", "p").code == 0


@pytest.mark.parametrize("data", [b"", b"GGUF", b"text", b"{}", b"[1]", b"\x10\0\0\0\0\0\0\0{}", b"{" * 100_000])
def test_what_is_not_ours_is_one_line(powerinfer: Program, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    result = powerinfer("inspect", "x")
    assert result.code == 1
    assert result.out == ""
    assert result.err.startswith("powerinfer: x: ")
    assert result.err.count("\n") == 1
