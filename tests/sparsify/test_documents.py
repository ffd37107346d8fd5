"""Documents are split before windows are cut, and a window's number says which text it has."""

import json
from pathlib import Path

import numpy as np
import pytest

from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.sparsify.documents import LONGEST, Mixture, make_source, read_documents
from powerinfer_tools.tokens import Tokenizer
from tests.tiny import TEMPLATE, make_tokenizer

SPECIAL = {"bos": None, "eos": [1], "add_bos": False}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(make_tokenizer(300), SPECIAL)


def test_two_blank_lines_divide_documents(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("One.\n\nStill one.\n\n\nTwo.\n\n\n\n\n")
    assert read_documents(path) == ["One.\n\nStill one.", "Two."]


def test_a_long_document_is_divided_between_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    paragraph = "x" * 1000
    path.write_text("\n\n".join([paragraph] * 40))
    parts = read_documents(path)
    assert len(parts) == 3
    assert all(len(part) <= LONGEST and part.endswith(paragraph) for part in parts)
    assert "".join(parts) == path.read_text()


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    path.write_text(json.dumps({"text": "a"}) + "\n\n" + json.dumps({"messages": chat, "more": 1}) + "\n")
    assert read_documents(path) == ["a", chat]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "x.jsonl:1: expected a JSON object"),
        ("[]", "x.jsonl:1: expected .*messages"),
        ('{"messages": [{"role": 1}]}', "x.jsonl:1: messages.0..role: expected a word"),
    ],
)
def test_a_line_that_is_no_document(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(line)
    with pytest.raises(PowerinferError, match=message):
        read_documents(path)


def test_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(PowerinferError, match=r"x\.txt: expected UTF-8 text"):
        read_documents(tmp_path / "x.txt")
    with pytest.raises(PowerinferError, match=r"y\.txt: expected a text file"):
        read_documents(tmp_path / "y.txt")


def test_no_held_out_document_is_trained_on(tokenizer: Tokenizer) -> None:
    documents = [f"{i:04} " * 30 for i in range(100)]
    source = make_source("s", [*documents, *documents[:50]], tokenizer, None, 8)
    held_out, training = (
        {word for word in tokenizer.decode(windows.ravel().tolist()).split() if len(word) == 4}
        for windows in (source.held_out, source.training)
    )
    assert not held_out & training
    assert len(held_out) >= 3
    assert len(held_out | training) == 100
    assert 0.03 < source.held_out.size / (source.held_out.size + source.training.size) < 0.1
    again = make_source("s", documents[::-1] + documents[:50], tokenizer, None, 8)
    assert set(again.held_out.ravel().tolist()) == set(source.held_out.ravel().tolist())


def test_chats_go_through_the_template(tokenizer: Tokenizer) -> None:
    chats = [[{"role": "user", "content": f"Question {i}"}] for i in range(40)]
    source = make_source("s", list(chats), tokenizer, TEMPLATE, 16)
    text = "".join(tokenizer.text(i) for i in source.training.ravel().tolist())
    assert text.count("<|im_start|>user") > 20


def test_too_few_tokens(tokenizer: Tokenizer) -> None:
    with pytest.raises(PowerinferError, match=r"s: expected documents of at least 64 tokens .* found 1 documents"):
        make_source("s", ["one two three " * 100], tokenizer, None, 64)


def test_windows_by_number() -> None:
    texts, chats = np.arange(10, dtype=np.int32)[:, None], np.arange(100, 103, dtype=np.int32)[:, None]
    drawn = [int(Mixture(texts, chats, 0.25, 7).window(k)[0]) for k in range(40)]
    assert sum(token >= 100 for token in drawn) == 10
    ordinary = [token for token in drawn if token < 100]
    epochs = [ordinary[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)  # nothing twice before all once
    assert epochs[0] != epochs[1]
    mixture = Mixture(texts, chats, 0.25, 7)
    assert [int(mixture.window(k)[0]) for k in reversed(range(40))] == drawn[::-1]
    assert [int(Mixture(texts, chats, 0.25, 8).window(k)[0]) for k in range(40)] != drawn
    assert all(int(Mixture(texts, chats[:0], 0.25, 7).window(k)[0]) < 10 for k in range(40))
