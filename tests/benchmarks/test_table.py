"""The table's arithmetic, and runs that measure what they say."""

import sys
from pathlib import Path

import pytest

from benchmarks.peers import run
from benchmarks.report import Line
from benchmarks.table import TRIES, Bench


def test_a_ratio_is_of_runs_of_the_same_round() -> None:
    line = Line("decode", "tokens/s", [10.0, 30.0, 20.0], [10.0, 10.0, 20.0], (1.0, 2.0))
    assert line.results == [1.0, 3.0, 1.0]
    assert line.reached == "at least"  # the medians of the sides alone would give 2.0


@pytest.mark.parametrize(("share", "reached"), [(74.9, "neither"), (75.0, "at least"), (90.0, "aim")])
def test_a_measure_of_ours_alone_is_its_own_result(share: float, reached: str) -> None:
    assert Line("share", "%", [share], target=(75, 90)).reached == reached


@pytest.mark.parametrize(("lost", "taken"), [([0.01], 0), ([0.3, 0.02], 1), ([0.3, 0.2, 0.1], 2)])
def test_runs_that_others_disturb_do_not_count(tmp_path: Path, lost: list[float], taken: int) -> None:
    bench = Bench(tmp_path, rounds=1, threads=2, folder=tmp_path, keep=False, kernels="best")
    runs = iter([{"others": share, "ceiling": 50.0 + i, "threads": 2.0} for i, share in enumerate(lost)])
    found = bench.in_turn({"ours": lambda: next(runs)})
    assert TRIES == 3
    assert [figures["ceiling"] for figures in found["ours"]] == bench.findings.ceilings[2] == [50.0 + taken]
    assert bench.findings.others == [lost[taken]]
    assert bench.findings.repeated == taken


def test_a_failed_run_says_why(tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(b"weights")
    with pytest.raises(SystemExit, match="exit status 3\nno such model"):
        run(
            [sys.executable, "-c", "import sys; print('no such model', file=sys.stderr); sys.exit(3)"],
            tmp_path / "model",
        )
