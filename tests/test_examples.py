"""The examples do what they say."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    root = str(EXAMPLES.parent)
    return subprocess.run(
        [str(part) for part in command],
        env={**os.environ, "PYTHONPATH": root, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that examples/pipeline.sh leaves."""
    folder = tmp_path_factory.mktemp("pipeline")
    main = f"{sys.executable} -m powerinfer_tools.cli.main"
    done = run(EXAMPLES / "pipeline.sh", folder, PYTHON=sys.executable, POWERINFER=main)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "pipeline: passed\n"
    return folder


@pytest.mark.slow
def test_the_pipeline_leaves_every_stage(pipeline: Path) -> None:
    made = {path.name for path in pipeline.glob("tiny.*")}
    assert made == {"tiny.activations", "tiny.predictors", "tiny.placement", "tiny.gguf"}


@pytest.mark.slow
def test_the_engine_runs_in_ten_lines(pipeline: Path) -> None:
    done = run(sys.executable, EXAMPLES / "engine.py", pipeline / "tiny.gguf", "The state of")
    assert done.returncode == 0, done.stderr
    assert "of the neurons fired" in done.stdout


def test_the_corpus_is_what_its_readme_says() -> None:
    sizes = {path.name: path.stat().st_size for path in (EXAMPLES / "corpus").glob("*.txt")}
    assert set(sizes) == {"sotu.txt", "factbook.txt", "jargon.txt", "heldout.txt"}
    rows = [line.split("|") for line in (EXAMPLES / "corpus" / "README.md").read_text().splitlines() if "KB |" in line]
    for _, name, _, size, *_ in rows:
        assert round(sizes[name.strip(" `")] / 1000) == int(size.split()[0])
    assert len(rows) == len(sizes)


def test_heldout_text_is_in_no_calibration_file() -> None:
    texts = {p.name: p.read_text(encoding="utf-8") for p in (EXAMPLES / "corpus").glob("*.txt")}
    heldout = {
        line for line in texts.pop("heldout.txt").splitlines() if len(line) > 200
    }  # longer than any form of address
    assert len(heldout) > 100
    shared = [line for text in texts.values() for line in text.splitlines() if line in heldout]
    assert shared == []
