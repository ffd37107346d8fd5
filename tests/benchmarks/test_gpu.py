"""The table of processor and card: which rows are measured when, what it says of them, a trial on the host device."""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import gpu, gpu_check
from benchmarks.gpu_report import Measure, agreement, markdown, measures, ratios, sound
from benchmarks.gpu_row import HOTTEST, LAYERS, OURS, PROCESSOR, RANDOM, Case, Contender, agreement_of, in_turn
from benchmarks.placement import PC_HIGH
from powerinfer_tools.errors import PowerinferError

ROOT = Path(__file__).parents[2]
ROUNDS = 3
STARTS = ("| falcon-40b", "| against", "| foretold")  # lines of the tables


def options(folder: Path, **changed: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    gpu.add_options(parser)
    given = parser.parse_args(["--device", "host", "--folder", str(folder), "--threads", "1", "2"])
    vars(given).update({"shapes": ["falcon-40b"], "quants": ["q4_0"], "budgets": [0.25, 1.0], **changed})
    return given


def document() -> dict[str, Any]:
    about = {"device": "host", "card": "a thread", "machine": {"processor": "p"}, "sources": "s"}
    return about | {"rows": {}, "foretold": []}


def contender(ms: list[float], **changed: Any) -> dict[str, Any]:
    """A contender's figures, as gpu_row measures them."""
    same = {"nmse": 0.0, "equal": True, "same_tokens": 1.0, "far_tokens": 0}
    zeros = dict.fromkeys(("hits_card", "transfers", "waits", "crossed_bytes", "wait_ms"), 0.0)
    figures = {
        "mode": "auto",
        "active": 0.05,
        "ms": ms,
        "prompt_tokens_per_s": [9.0],
        "predicted_ms": ms[0],
        "card_bytes": 50,
    }
    plan = {"head": True, "dense": [True] * 3, "neurons": [32] * 3}
    return figures | zeros | {"plan": plan, "read_bytes": {"card": 8e6, "ram": 2e6}, "agreement": same} | changed


def row_of(case: Case, **contenders: dict[str, Any]) -> dict[str, Any]:
    names = {"ours": OURS, "hottest": HOTTEST, "random": RANDOM, "layers": LAYERS, "processor": PROCESSOR}
    found = {names[name]: figures for name, figures in contenders.items()}
    return {"case": asdict(case), "machine": PC_HIGH.to_json(), "vram": 100, "contenders": found}


def a_case(folder: Path, share: float = 0.25, **changed: Any) -> Case:
    case = gpu.cases(options(folder, budgets=[share]))[0]
    return replace(case, **changed)


def test_rows_of_one_file_are_measured_side_by_side(tmp_path: Path) -> None:
    files = [(case.shape, case.quant) for case in gpu.cases(options(tmp_path, quants=["q4_0", "f16"]))]
    assert len(files) == 8
    assert sum(a != b for a, b in pairwise(files)) == 1


def test_a_run_goes_on_where_another_one_ended(tmp_path: Path) -> None:
    found, saved, asked = document(), [], []

    def row(case: Case, model: Path, rounds: int) -> dict[str, Any]:
        assert model.exists()
        asked.append(case.key)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return {"error": "a broken card"} if len(asked) == 2 else {"contenders": {}}

    keys = [case.key for case in gpu.cases(options(tmp_path))]
    with pytest.raises(KeyboardInterrupt):
        gpu.fill(found, options(tmp_path), lambda: saved.append(len(found["rows"])), row)
    assert saved == [1, 2]
    assert gpu.fill(found, options(tmp_path), lambda: None, row) == 0
    assert asked == [*keys[:3], *keys[1:]]  # what failed and what was not done
    assert list(tmp_path.iterdir()) == []  # no model is kept


def test_no_row_begins_that_would_end_too_late(tmp_path: Path) -> None:
    found = document()
    assert gpu.fill(found, options(tmp_path, time_limit=0), lambda: None, lambda *_: {}) == 4
    assert found["rows"] == {}


def test_rows_of_another_card_are_not_mixed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POWERINFER_DEVICE", "host")
    gpu.write(gpu.fresh("host") | {"card": "another"}, tmp_path / "gpu.json")
    with pytest.raises(PowerinferError, match="found those of another beside"):
        gpu.opened(tmp_path / "gpu.json", "host")
    gpu.write(gpu.fresh("host") | {"rows": {"a": {"case": 1}}}, tmp_path / "gpu.json")
    assert gpu.opened(tmp_path / "gpu.json", "host")["rows"] == {"a": {"case": 1}}


def test_contenders_run_in_turn() -> None:
    contenders = [Contender(name, "auto", None, None) for name in "ab"]  # type: ignore[arg-type]
    order: list[str] = []

    def once(one: Contender) -> Any:
        order.append(one.name)
        return len(order)

    runs: dict[str, Any] = in_turn(contenders, ROUNDS, once)
    assert order == ["a", "b"] * ROUNDS
    assert runs == {"a": [1, 3, 5], "b": [2, 4, 6]}


def test_logits_are_compared_token_by_token() -> None:
    expected = np.array([[0.0, 1.0, 4.0], [4.0, 0.0, 3.99]], np.float32)
    found = expected.copy()
    assert agreement_of(found, expected) == {"nmse": 0.0, "equal": True, "same_tokens": 1.0, "far_tokens": 0}
    found[1, 2] = 4.01
    near = agreement_of(found, expected)
    assert (near["equal"], near["same_tokens"], near["far_tokens"]) == (False, 0.5, 0)
    found[0] = [4.0, 1.0, 0.0]
    assert agreement_of(found, expected)["far_tokens"] == 1


def test_a_ratio_is_of_runs_of_the_same_round(tmp_path: Path) -> None:
    row = row_of(a_case(tmp_path), ours=contender([1.0, 2.0]), layers=contender([8.0, 8.0]))
    assert ratios(row, LAYERS) == [8.0, 4.0]
    assert ratios(row, HOTTEST) == [1.0, 1.0]  # the same plan as ours, which was not run twice


def test_what_is_asked_is_taken_from_the_rows_that_say_it(tmp_path: Path) -> None:
    quarter, whole = a_case(tmp_path), a_case(tmp_path, 1.0)
    slow = contender([1.0], predicted_ms=1.2)
    rows = [
        row_of(quarter, ours=slow, layers=contender([6.0]), hottest=contender([0.9]), random=contender([2.0])),
        row_of(whole, ours=contender([0.5]), hottest=contender([1.0]), layers=contender([1.5])),
    ]
    found = {measure.name.split(": ")[-1]: (round(measure.value, 6), measure.reached) for measure in measures(rows)}
    share = 100 * 8e6 / 1.5e-3 / PC_HIGH.vram.sequential  # type: ignore[union-attr]
    assert found == {
        "against whole layers, dense, 25 %": (6.0, "at least"),
        "all on the card, sparse against dense": (1.5, "at least"),
        "share of the card's read ceiling, dense": (pytest.approx(share, rel=1e-6), "neither"),
        "against hottest first, slowest row": (0.9, "neither"),
        "against hottest first, median of the rows": (0.9, "neither"),
        "against random, slowest row": (2.0, "aim"),
        "against random, median of the rows": (2.0, "aim"),
        "foretold against measured time, all contenders": (0.0, "aim"),
        "foretold against measured time, worst": (20.0, "at least"),
    }


@pytest.mark.parametrize(("value", "reached"), [(9, "aim"), (10, "aim"), (11, "at least"), (26, "neither")])
def test_where_less_is_better_less_reaches_more(value: float, reached: str) -> None:
    assert Measure("error", "%", [value], 25, 10, []).reached == reached


def test_a_row_is_sound_if_it_agrees_with_the_processor_and_keeps_its_budget(tmp_path: Path) -> None:
    here, card = a_case(tmp_path), a_case(tmp_path, device="cuda")

    def found(case: Case, ours: dict[str, Any] | None = None, **dense: Any) -> dict[str, Any]:
        agree = {"nmse": 1e-4, "equal": False, "same_tokens": 1.0, "far_tokens": 1} | dense
        layers = contender([1.0], mode="dense", agreement=agree, card_bytes=200)
        alone = contender([1.0], agreement=None)
        return row_of(case, ours=contender([1.0], **(ours or {})), layers=layers, processor=alone)

    assert sound(found(here, equal=True))
    assert not sound(found(here))
    assert sound(found(card))
    assert not sound(found(card, nmse=0.01))
    assert not sound(found(card, {"card_bytes": 101}))
    assert not sound(found(card, {"active": 0.06}))
    assert not sound({"case": {}, "error": "a broken card"})
    f16 = a_case(tmp_path, device="cuda", quant="f16")
    assert agreement(found(f16, nmse=1e-6, far_tokens=0)).startswith("ok")
    assert agreement(found(f16, nmse=1e-6)).startswith("NO")


def test_the_table_is_made_of_the_document_alone(tmp_path: Path) -> None:
    case = a_case(tmp_path)
    found = document()
    found["rows"][case.key] = row_of(case, ours=contender([2.0]), layers=contender([9.0]), processor=contender([4.0]))
    found["rows"]["another"] = {"case": {}, "error": "a broken card"}
    found["foretold"] = gpu.foretell(options(tmp_path))
    text = markdown(json.loads(json.dumps(found)))
    assert "4.50 (4.50 to 4.50)" in text
    lines = [line for line in text.split("Not measured")[0].splitlines() if line.startswith(STARTS)]
    assert len(lines) == 1 + 3 + 7  # of the three tables
    assert all("| 15.0 " in line for line in lines)  # GPU : CPU
    assert "FAILED: another: a broken card" in text
    assert "its times mean nothing" in text
    assert "falcon-40b, 60 layers, q4_0, 5% active" in text


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_step_that_takes_too_long_ends_with_all_that_it_started(tmp_path: Path) -> None:
    check, begun = gpu_check.Check(argparse.Namespace(device="host"), time.monotonic() + 2), tmp_path / "begun"
    with pytest.raises(gpu_check.Left, match="sh: not done after"):
        check.call("sh", "-c", f"sleep 600 & echo $! > {begun}; wait")
    assert not alive(int(begun.read_text()))


def test_a_step_that_fails_says_why() -> None:
    check = gpu_check.Check(argparse.Namespace(device="host"), float("inf"))
    assert check.call("sh", "-c", "echo fine") == "fine"
    with pytest.raises(gpu_check.Failed, match="exit status 3\nwhy"):
        check.call("sh", "-c", "echo why; exit 3")
    with pytest.raises(gpu_check.Failed, match="no such program"):
        check.call("nowhere-to-be-found")


def test_without_a_card_it_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    done = subprocess.run([sys.executable, "benchmarks/gpu_check.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "no card here" in done.stderr


@pytest.mark.slow
def test_all_but_whole_runs_is_checked_without_a_card(tmp_path: Path) -> None:
    words = ["--device", "host", "-o", str(tmp_path), "--folder", str(tmp_path), "-t", "2", "--rounds", "2"]
    words += ["--steps", "card", "missing", "benchmarks"]
    done = subprocess.run([sys.executable, "benchmarks/gpu_check.py", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu-check.json").read_text())
    assert {name: step["status"] for name, step in found["steps"].items()} == dict.fromkeys(words[-3:], "ok")
    assert len(found["rows"]) == 20
    assert any(0.2 < row["contenders"][OURS]["hits_card"] < 1 for row in found["rows"].values())
    assert "gpu-check on a thread" in (tmp_path / "gpu-check.txt").read_text()


@pytest.mark.slow
def test_whole_runs_are_equal_bit_for_bit_on_the_host_device() -> None:
    words = ["--device", "host", "--models", "llama", "falcon", "odd", "--quants", "f16", "q4_0"]
    done = subprocess.run([sys.executable, "benchmarks/gpu_runs.py", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == [
        f"{quant}: 150 runs, 150 equal bit for bit, worst NMSE 0.0e+00" for quant in ("f16", "q4_0")
    ]
