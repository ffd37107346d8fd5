"""tokenizer.model, written field by field as sentencepiece_model.proto numbers them, cuts text as its GGUF does."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from powerinfer_tools.checkpoint import open_checkpoint
from powerinfer_tools.checkpoint.fields import Fields
from powerinfer_tools.checkpoint.gguf_tokenizer import rebuild_tokenizer
from powerinfer_tools.checkpoint.sentencepiece import convert_sentencepiece
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.sparsify import write_folder
from tests.checkpoint.test_gguf_tokenizer import TEXTS, sentencepiece_keys
from tests.checkpoint.test_huggingface import edit
from tests.tiny import make_llama


def varint(value: int) -> bytes:
    low, rest = value & 127, value >> 7
    return bytes([low]) if not rest else bytes([low | 128]) + varint(rest)


def message(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def model(keys: dict[str, Any], kind: int = 2) -> bytes:
    """A ModelProto of what GGUF says of the same vocabulary; the type of a normal piece is left out, as it may be."""
    columns = (keys[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))
    pieces = [
        message(1, token.encode())
        + varint(2 << 3 | 5)
        + struct.pack("<f", score)
        + (varint(3 << 3) + varint(type) if type != 1 else b"")
        for token, score, type in zip(*columns, strict=True)
    ]
    trainer = varint(3 << 3) + varint(kind) + varint(10 << 3 | 1) + bytes(8)
    normalizer = varint(3 << 3) + varint(keys["tokenizer.ggml.add_space_prefix"])
    return b"".join(message(1, piece) for piece in pieces) + message(2, trainer) + message(3, normalizer)


@pytest.mark.parametrize("prefixed", [True, False])
def test_cuts_as_the_same_vocabulary_in_gguf(tmp_path: Path, prefixed: bool) -> None:
    keys = sentencepiece_keys(prefixed)
    (tmp_path / "tokenizer.model").write_bytes(model(keys))
    ours = Tokenizer.from_str(convert_sentencepiece(tmp_path / "tokenizer.model"))
    theirs = Tokenizer.from_str(rebuild_tokenizer(Fields("m.gguf", keys)))
    for text in [*TEXTS, "the fox in the thing", "<s>the<tool>fox</s>"]:
        assert ours.encode(text).ids == theirs.encode(text).ids
        assert ours.decode(ours.encode(text).ids) == theirs.decode(ours.encode(text).ids)


def test_a_folder_without_tokenizer_json(tmp_path: Path) -> None:
    """As of Bamboo-base-v0_1 and ReluLLaMA-7B; added tokens follow the model's own."""
    folder, keys = make_llama(tmp_path, n_vocab=400), sentencepiece_keys()
    n = len(keys["tokenizer.ggml.tokens"])
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(model(keys))
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_start|>": n + 1, "<|im_end|>": n, "<s>": 1}))
    checkpoint = open_checkpoint(folder)
    tokenizer = Tokenizer.from_str(checkpoint.tokenizer_json)
    assert tokenizer.encode("<|im_start|>the<|im_end|>").ids == [n + 1, *tokenizer.encode("the").ids, n]
    assert (checkpoint.special["bos"], checkpoint.special["eos"], checkpoint.special["add_bos"]) == (1, [2, 1], True)
    edit(folder / "tokenizer_config.json", add_bos_token=False)
    assert open_checkpoint(folder).special["add_bos"] is False
    (tmp_path / "copy").mkdir()
    write_folder(checkpoint, checkpoint, tmp_path / "copy")
    assert open_checkpoint(tmp_path / "copy").tokenizer_json == checkpoint.tokenizer_json
    before = checkpoint.digest()
    (folder / "added_tokens.json").unlink()
    assert open_checkpoint(folder).digest() != before


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "KeyError"),
        (message(1, b"\x0a\x05abc"), "where a field ends at 7"),
        (b"\x0b", "wire type 3 at byte 1"),
        (b"\x80" * 12, "a number that does not end"),
        (varint(1 << 3) + varint(5), "TypeError"),
        (message(1, message(1, b"\xff")), "UnicodeDecodeError"),
        (message(1, varint(1 << 3) + varint(5)), "AttributeError"),
        (message(1, message(1, b"a") + message(2, b"abc")), "error"),
    ],
)
def test_garbage(tmp_path: Path, data: bytes, found: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(PowerinferError, match=f"expected a SentencePiece model, found .*{found}"):
        convert_sentencepiece(tmp_path / "tokenizer.model")


def test_refuses_what_is_not_bpe(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model(sentencepiece_keys(), kind=1))
    with pytest.raises(PowerinferError, match="model_type: expected 2, BPE, found 1"):
        convert_sentencepiece(tmp_path / "tokenizer.model")


def test_refuses_a_gap_in_the_ids(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model(sentencepiece_keys()))
    (tmp_path / "added_tokens.json").write_text('{"<|im_end|>": 5000}')
    with pytest.raises(PowerinferError, match=r"added_tokens\.json: expected ids from \d+ on, one by one"):
        convert_sentencepiece(tmp_path / "tokenizer.model")
