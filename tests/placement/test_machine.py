"""Machines: files, bandwidths between measured sizes, and the disk measurement."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.placement import Machine, Tier, measure, read_machine, write_machine
from tests.placement import worlds

CARD = replace(worlds.machine(), vram=Tier(1 << 30, 1e12, ((64, 1e11),), 1e-6, 1e-6, 2e10, 300 << 20), card="a card")


def test_files_are_read_as_they_were_written(tmp_path: Path) -> None:
    for machine in (worlds.machine(), replace(worlds.machine(), vram=None, disk=None, notes=("a note",)), CARD):
        write_machine(machine, tmp_path / "m", force=True)
        assert read_machine(tmp_path / "m") == machine


def test_bandwidth_between_measured_sizes_and_beyond_them() -> None:
    tier = Tier(0, 9.0, ((100, 1.0), (10000, 3.0)))
    assert [tier.row_bandwidth(n) for n in (1, 100, 10000, 10**6)] == [1.0, 1.0, 3.0, 3.0]
    assert tier.row_bandwidth(1000) == pytest.approx(2.0)
    assert Tier(0, 9.0, ()).row_bandwidth(5) == 9.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ram": ...}, "KeyError"),
        ({"ram": {"n_bytes": 1, "sequential": 0, "rows": []}}, "expected bandwidths above 0"),
        ({"ram": {"n_bytes": 1, "sequential": 1, "rows": [[2, 1], [1, 1]]}}, "expected rows by rising size"),
        ({"ram": {"n_bytes": 1, "sequential": 1, "rows": [], "latency_s": -1}}, "latency_s"),
        ({"vram": {"n_bytes": 1, "sequential": 1, "rows": [], "launch_s": -1}}, "launch_s"),
        ({"vram": {"n_bytes": 1, "sequential": 1, "rows": [], "context": float("inf")}}, "OverflowError"),
        ({"ram": [["rows", 1]]}, "TypeError"),
        ({"kind": "placement"}, "expected a file of kind machine"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    data = worlds.machine().to_json() | change
    path = tmp_path / "m"
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))
    with pytest.raises(PowerinferError, match=message):
        read_machine(path)


def test_no_json_and_no_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(PowerinferError, match="no such file"):
        read_machine(tmp_path / "m")
    (tmp_path / "m").write_bytes(b"GGUF\xff")
    with pytest.raises(PowerinferError, match="expected a machine file"):
        read_machine(tmp_path / "m")


def test_the_disk_is_measured_and_its_file_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "FILE_BYTES", 16 << 20)
    monkeypatch.setattr(measure, "SECONDS", 0.01)
    notes: list[str] = []
    disk = measure._measure_disk(tmp_path, notes)
    assert disk is not None
    assert [size for size, _ in disk.rows] == list(measure.READ_BYTES)
    assert all(speed > 0 for _, speed in disk.rows)
    assert disk.sequential > 0
    assert disk.latency_s > 0
    assert any("flatter" in note for note in notes)
    assert list(tmp_path.iterdir()) == []


def test_a_measurement_is_kept_and_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POWERINFER_CACHE", str(tmp_path / "cache"))
    made: list[Machine] = []

    def measured(threads: int, folder: Path, say: Any, card: bool) -> Machine:
        assert not card
        device = {"disk_device": tmp_path.stat().st_dev}
        made.append(replace(worlds.machine(), name=measure._processor(), threads=threads, **device))
        return made[-1]

    monkeypatch.setattr(measure, "measure_machine", measured)
    said: list[str] = []
    first = measure.cached_machine(tmp_path, 2, said.append)
    second = measure.cached_machine(tmp_path, 2, said.append)
    assert first == second
    assert len(made) == 1
    assert len(said) == 1
    assert "measured now" in said[0]
    anew = replace(first, ram=replace(first.ram, sequential=5e9))
    assert str(measure.keep_machine(anew)) in said[0]
    assert measure.cached_machine(tmp_path, 2) == anew
    measure.machine_path(2).write_text("broken")
    assert measure.cached_machine(tmp_path, 2) == made[1]


def test_a_disk_is_measured_once_for_each_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POWERINFER_CACHE", str(tmp_path))
    monkeypatch.setattr(measure, "SECONDS", 0.01)
    elsewhere = replace(worlds.machine(), name=measure._processor(), disk_device=tmp_path.stat().st_dev + 1)
    measure.keep_machine(elsewhere)
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    assert measure.cached_machine(None, 2) == elsewhere
    found = measure.cached_machine(tmp_path / "file", 2)
    assert found.disk != elsewhere.disk
    assert found.disk_device == tmp_path.stat().st_dev
    assert measure.cached_machine(tmp_path, 2) == measure.cached_machine(tmp_path / "file", 2) == found


def test_files_without_a_cards_launches_and_copies_are_read(tmp_path: Path) -> None:
    data = CARD.to_json()
    assert CARD.vram is not None
    for name in ("launch_s", "copy", "context"):
        del data["vram"][name]
    del data["card"]
    (tmp_path / "m").write_text(json.dumps(data))
    before = Tier(CARD.vram.n_bytes, CARD.vram.sequential, CARD.vram.rows, CARD.vram.latency_s)
    assert read_machine(tmp_path / "m") == replace(CARD, vram=before, card="")


def test_a_card_is_measured_where_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POWERINFER_CACHE", str(tmp_path))
    monkeypatch.setenv("POWERINFER_DEVICE", "host")
    monkeypatch.setattr(measure, "BUFFER_BYTES", 1 << 20)
    bare = replace(worlds.machine(), name=measure._processor(), vram=None, disk_device=tmp_path.stat().st_dev)
    monkeypatch.setattr(measure, "measure_machine", lambda *_, **__: bare)
    assert measure.cached_machine(tmp_path, 2).vram is None
    said: list[str] = []
    machine = measure.cached_machine(tmp_path, 2, said.append, card=True)
    assert machine == measure.cached_machine(tmp_path, 2, card=True) == measure.cached_machine(tmp_path, 2)
    assert machine.vram is not None
    assert "for tests" in machine.card
    assert [size for size, _ in machine.vram.rows] == list(measure.ROW_BYTES)
    assert min(machine.vram.sequential, machine.vram.latency_s, machine.vram.launch_s, machine.vram.copy) > 0
    assert any("measuring the card" in line for line in said)


def test_the_context_that_a_plan_counts_is_the_cards_of_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another driver may take more: a plan that fills the budget would fail at load."""
    monkeypatch.setenv("POWERINFER_CACHE", str(tmp_path))
    monkeypatch.setenv("POWERINFER_DEVICE", "host")
    kept = replace(CARD, name=measure._processor())
    measure.keep_machine(kept)
    monkeypatch.setattr(measure, "describe_card", lambda device: ("a card", 1 << 30, 1 << 29, 400 << 20))
    now = measure.cached_machine(None, 2, card=True)
    assert kept.vram is not None
    assert now == replace(kept, vram=replace(kept.vram, context=400 << 20))
    assert measure.cached_machine(None, 2) == kept


def test_a_missing_card_is_a_note_or_where_it_is_needed_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POWERINFER_CACHE", str(tmp_path))
    monkeypatch.setenv("POWERINFER_CUDA_LIB", str(tmp_path / "none.so"))
    monkeypatch.setattr(measure, "BUFFER_BYTES", 1 << 20)
    notes = measure.measure_machine(1).notes
    assert [note for note in notes if note.startswith("no card: no CUDA part of the engine (make native CUDA=1)")]
    with pytest.raises(PowerinferError, match="no CUDA part of the engine"):
        measure.cached_machine(tmp_path, 1, card=True)
    monkeypatch.setenv("POWERINFER_DEVICE", "abacus")
    with pytest.raises(PowerinferError, match="POWERINFER_DEVICE: expected cuda or host, found 'abacus'"):
        measure.device()
