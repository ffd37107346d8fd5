"""Chats that a model writes: the decoder is the model, a seed names the chats, and what is kept is not written anew."""

from pathlib import Path
from typing import Any

import pytest
import torch

from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.progress import silent
from powerinfer_tools.sparsify import self_generation as library
from powerinfer_tools.sparsify.decoder import Decoder
from powerinfer_tools.sparsify.documents import read_documents
from powerinfer_tools.sparsify.model import Teacher, load_teacher
from powerinfer_tools.sparsify.self_generation import Frame, make_frame, self_generate
from powerinfer_tools.sparsify.team import Team
from powerinfer_tools.tokens import Tokenizer, chat_ids
from powerinfer_tools.tokens.template import Message
from tests.drawn import DrawnCheckpoint, drawn_config, rope_of
from tests.sparsify.conftest import Bench


@pytest.fixture
def teacher(bench: Bench) -> Teacher:
    return load_teacher(bench.checkpoint, "cpu", "float32")


@pytest.fixture
def tokenizer(bench: Bench) -> Tokenizer:
    return Tokenizer(bench.checkpoint.tokenizer_json, bench.checkpoint.special)


def write(bench: Bench, folder: Path, seed: int = 0, n_tokens: int = 1500) -> list[list[Message]]:
    teacher = load_teacher(bench.checkpoint, "cpu", "float32")
    tokenizer = Tokenizer(bench.checkpoint.tokenizer_json, bench.checkpoint.special)
    frame = make_frame(bench.checkpoint, tokenizer)
    folder.mkdir(exist_ok=True)
    team = Team(0, 1, "cpu")
    return self_generate(teacher, tokenizer, frame, folder, n_tokens=n_tokens, seed=seed, team=team, show=silent)


def test_tokens_are_drawn_with_their_probability() -> None:
    probability = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05, 0.0])
    drawn = library._draw(probability.log().repeat(20000, 1), torch.Generator().manual_seed(0))
    found = torch.bincount(drawn, minlength=6) / 20000
    torch.testing.assert_close(found, probability, atol=0.015, rtol=0)
    assert found[[1, 5]].tolist() == [0, 0]


@pytest.mark.parametrize("structure", [None, {"parallel": True, "qk_norm": True, "rope": rope_of(6), "norm": "layer"}])
def test_the_decoder_is_the_model(teacher: Teacher, structure: dict[str, Any] | None) -> None:
    if structure is not None:
        checkpoint = DrawnCheckpoint(drawn_config(**structure, activation="silu"))
        teacher = load_teacher(checkpoint, "cpu", "float32")
    prompt, rows = [5, 9, 200], [[7, 30, 31, 99], [250, 3, 8, 41], [66, 67, 68, 69]]
    with torch.no_grad():
        whole = teacher.logits(teacher.streams(torch.tensor([prompt + row for row in rows]))[-1])
        decoder = Decoder(teacher, 8)
        torch.testing.assert_close(decoder.begin(prompt, 3), whole[:, 2], atol=1e-5, rtol=1e-5)
        for i in range(2):
            found = decoder.step([row[i] for row in rows])
            torch.testing.assert_close(found, whole[:, 3 + i], atol=1e-5, rtol=1e-5)
        decoder.keep([0, 2])
        for i in (2, 3):
            found = decoder.step([rows[0][i], rows[2][i]])
            torch.testing.assert_close(found, whole[[0, 2], 3 + i], atol=1e-5, rtol=1e-5)


def test_the_frame_is_the_template(bench: Bench, tokenizer: Tokenizer) -> None:
    frame = make_frame(bench.checkpoint, tokenizer)
    question = tokenizer.encode("fox", add_bos=False, parse_special=False)
    messages = [{"role": "user", "content": "fox"}]
    assert frame.begin + question + frame.link == chat_ids(tokenizer, bench.checkpoint.chat_template, messages)


def test_a_row_goes_from_question_to_answer() -> None:
    row = library._Row(link=[90, 91, 92], ends=frozenset({99}))
    fed = [row.take(drawn) for drawn in (1, 2, 99, 3, 4, 5, 6)]
    assert fed == [1, 2, 90, 91, 92, 5, 6]  # what was drawn while the link was fed does not count
    assert (row.question, row.answer, row.done) == ([1, 2], [5, 6], False)
    for drawn in (99, 7):
        row.take(drawn)
    assert (row.answer, row.done) == ([5, 6], True)


def test_a_seed_names_the_chats(bench: Bench) -> None:
    chats = write(bench, bench.folder / "a")
    assert len(chats) > 3
    assert all([m["role"] for m in chat] == ["user", "assistant"] and all(m["content"] for m in chat) for chat in chats)
    assert write(bench, bench.folder / "b") == chats
    assert write(bench, bench.folder / "c", seed=1) != chats


def test_kept_pieces_are_not_written_anew(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    chats = write(bench, bench.folder / "a")

    def refuse(*args: object) -> None:
        raise AssertionError

    monkeypatch.setattr(library, "_write_rows", refuse)
    assert write(bench, bench.folder / "a") == chats


def test_a_model_that_ends_no_question(bench: Bench, teacher: Teacher, tokenizer: Tokenizer) -> None:
    tokenizer.control = frozenset()
    frame = Frame([0], [-1])  # nothing that could be drawn
    with pytest.raises(PowerinferError, match="the model writes no chats"):
        self_generate(teacher, tokenizer, frame, bench.folder, n_tokens=9, seed=0, team=Team(0, 1, "cpu"), show=silent)


def test_a_run_trains_on_its_own_chats(bench: Bench) -> None:
    result = bench.sparsify(self_tokens=3000, n_tokens=512)
    assert result.chats is not None
    assert result.chats.name == "out.chats.jsonl"
    assert len(read_documents(result.chats)) > 5
    assert set(result.student.perplexity) == {str(bench.text), "self-generated", "all"}


def test_a_model_without_a_template(bench: Bench, tmp_path: Path) -> None:
    import shutil

    bench.model = Path(shutil.copytree(bench.model, tmp_path / "plain"))
    (bench.model / "tokenizer_config.json").unlink()
    with pytest.raises(PowerinferError, match="--self-generate needs a chat template, found none"):
        bench.sparsify(self_tokens=100)
