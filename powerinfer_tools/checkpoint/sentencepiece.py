"""tokenizer.model, as SentencePiece writes it: what older folders have in place of a tokenizer.json.

A protocol buffer (sentencepiece_model.proto): ModelProto has pieces (1), trainer_spec (2) and normalizer_spec (3);
a piece has its text (1), score (2) and type (3), which GGUF numbers alike.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from powerinfer_tools.checkpoint.fields import Fields, read_json
from powerinfer_tools.checkpoint.gguf_tokenizer import CONTROL, NORMAL, PREFIX, rebuild_tokenizer
from powerinfer_tools.errors import PowerinferError

LIMIT = 16 << 20
BPE = 2  # trainer_spec.model_type; 1 is unigram
UNKNOWN = 2  # type of a piece
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types

Message = dict[int, list[Any]]


def convert_sentencepiece(path: Path) -> str:
    """The text of a tokenizer.json that cuts text as tokenizer.model at `path` and the added_tokens.json beside it do.

    Errors: too large, no such buffer, a model that is not BPE.
    """
    if path.stat().st_size > LIMIT:
        raise PowerinferError(f"{path}: expected at most {LIMIT} bytes, found {path.stat().st_size}", "malformed")
    try:
        model = parse(path.read_bytes())
        pieces = [parse(piece) for piece in model[1]]
        trainer, normalizer = (parse(model.get(field, [b""])[-1]) for field in (2, 3))
        tokens = [piece[1][-1].decode() for piece in pieces]
        scores = [struct.unpack("<f", piece.get(2, [bytes(4)])[-1])[0] for piece in pieces]
        types = [int(piece.get(3, [NORMAL])[-1]) for piece in pieces]
    except (LookupError, ValueError, TypeError, AttributeError, struct.error) as error:
        raise PowerinferError(f"{path}: expected a SentencePiece model, found {error!r}", "malformed") from error
    if (kind := trainer.get(3, [1])[-1]) != BPE:
        raise PowerinferError(f"{path}: model_type: expected {BPE}, BPE, found {kind}", "unsupported")
    added = _added(path.parent, len(tokens))
    values = {
        "model": "llama",
        "tokens": tokens + added,
        "scores": scores + [0.0] * len(added),
        "token_type": types + [CONTROL] * len(added),
        "unknown_token_id": types.index(UNKNOWN) if UNKNOWN in types else 0,
        "add_space_prefix": bool(normalizer.get(3, [1])[-1]),
    }
    return rebuild_tokenizer(Fields(str(path), {f"{PREFIX}{key}": value for key, value in values.items()}))


def parse(data: bytes) -> Message:
    """A message's fields by number, each with all its values. Errors (ValueError): a field that is cut or unknown."""
    message: Message = {}
    for field, value in _fields(data):
        message.setdefault(field, []).append(value)
    return message


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == VARINT:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == BYTES:
            size, at = _varint(data, at)
        elif wire in (FIXED32, FIXED64):
            size = 4 if wire == FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if at + size > len(data):
            raise ValueError(f"{len(data)} bytes, where a field ends at {at + size}")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number that begins at `at`, seven bits a byte, and where it ends."""
    value = 0
    for shift in range(0, 64, 7):
        if at >= len(data):
            break
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise ValueError(f"a number that does not end before byte {at}")


def _added(folder: Path, n: int) -> list[str]:
    """The tokens of added_tokens.json beyond the model's n. Errors: ids that do not follow the model's, one by one."""
    path = folder / "added_tokens.json"
    fields = Fields(str(path), read_json(path, LIMIT) if path.is_file() else {})
    beyond = sorted((fields.integer(token, low=0), token) for token in fields.values)
    beyond = [(i, token) for i, token in beyond if i >= n]
    if [i for i, _ in beyond] != list(range(n, n + len(beyond))):
        raise PowerinferError(f"{path}: expected ids from {n} on, one by one, found others", "mismatch")
    return [token for _, token in beyond]
