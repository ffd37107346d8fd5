"""Texts to documents, documents to a training and a held-out set, each set to windows of tokens."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.files import canonical_json, sha256_bytes
from powerinfer_tools.tokens import Tokenizer, chat_ids, check_messages
from powerinfer_tools.tokens.template import Message

HELD_OUT = 0.05  # share of a source's tokens that no training sees
LONGEST = 16384  # characters of a document; a longer one is divided between paragraphs

Document = str | list[Message]
Ids = npt.NDArray[np.int32]


def read_documents(path: Path) -> list[Document]:
    """The documents of a file. Text: two blank lines between them. .jsonl: {"text"} or {"messages"} a line.

    Errors: no such file, not UTF-8, a line that is neither.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PowerinferError(f"{path}: expected UTF-8 text, found {error.reason}", "input") from None
    except OSError as error:
        raise PowerinferError(f"{path}: expected a text file, found {error.strerror}", "usage") from None
    if path.suffix == ".jsonl":
        return [_from_json(line, f"{path}:{i + 1}") for i, line in enumerate(text.splitlines()) if line.strip()]
    return [part for document in text.split("\n\n\n") if document.strip() for part in _parts(document)]


def _from_json(line: str, where: str) -> Document:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PowerinferError(f"{where}: expected a JSON object, found {error}", "malformed") from None
    if isinstance(value, dict) and isinstance(value.get("text"), str):
        return str(value["text"])
    if isinstance(value, dict) and "messages" in value:
        return check_messages(value["messages"], f"{where}: messages")
    raise PowerinferError(f'{where}: expected {{"text": …}} or {{"messages": […]}}', "malformed")


def _parts(document: str) -> Iterator[str]:
    """The document, in parts of at most LONGEST characters that end with a paragraph where they can."""
    while len(document) > LONGEST:
        end = document.rfind("\n\n", 1, LONGEST)
        end = end if end > 0 else LONGEST
        yield document[:end]
        document = document[end:]
    yield document


@dataclass(frozen=True)
class Source:
    """The windows [n, window] of one source; the two sets share no document."""

    name: str
    training: Ids
    held_out: Ids


def make_source(
    name: str, documents: list[Document], tokenizer: Tokenizer, template: str | None, window: int
) -> Source:
    """Encodes and splits: those documents with the smallest digests are held out, a twentieth of the tokens.

    Errors: fewer documents than two, or too few tokens for a window of each set.
    """
    encoded = [(_digest(document), _encode(document, tokenizer, template)) for document in documents]
    wanted = max(window, HELD_OUT * sum(len(ids) for _, ids in encoded))
    held_out: set[str] = set()
    n = 0
    for digest, ids in sorted(encoded):
        if n < wanted and digest not in held_out:
            n += len(ids)
            held_out.add(digest)
    training = _windows([ids for digest, ids in encoded if digest not in held_out], window)
    if len(training) == 0:
        raise PowerinferError(
            f"{name}: expected documents of at least {window} tokens for training and as many held out, found "
            f"{len(documents)} documents of {sum(len(ids) for _, ids in encoded)} tokens; "
            "two blank lines divide documents"
        )
    return Source(name, training, _windows([ids for digest, ids in encoded if digest in held_out], window))


def _digest(document: Document) -> str:
    return sha256_bytes(canonical_json(document).encode("utf-8", "replace"))


def _encode(document: Document, tokenizer: Tokenizer, template: str | None) -> list[int]:
    if isinstance(document, str):
        return tokenizer.encode(document, add_bos=True, parse_special=False)
    return chat_ids(tokenizer, template, document, add_generation_prompt=False)


def _windows(documents: list[list[int]], window: int) -> Ids:
    ids = np.concatenate([np.array(d, dtype=np.int32) for d in documents] or [np.empty(0, np.int32)])
    return ids[: len(ids) // window * window].reshape(-1, window)


@dataclass
class Mixture:
    """An endless row of training windows, the same for the same seed: window k depends on nothing but k.

    texts, chats: windows [n, window]; chat_share of the row comes from chats, where there are any.
    """

    texts: Ids
    chats: Ids
    chat_share: float
    seed: int
    _orders: dict[tuple[int, int], npt.NDArray[np.int64]] = field(default_factory=dict)

    def window(self, k: int) -> Ids:
        share = self.chat_share if len(self.chats) else 0.0
        before, after = int(k * share), int((k + 1) * share)  # chats among the first k windows, and k + 1
        return self._drawn(1, self.chats, before) if after > before else self._drawn(0, self.texts, k - before)

    def _drawn(self, which: int, windows: Ids, i: int) -> Ids:
        """The i-th draw from one kind: all windows in a new order each epoch."""
        epoch, place = divmod(i, len(windows))
        if (which, epoch) not in self._orders:
            order = np.random.default_rng([self.seed, which, epoch]).permutation(len(windows))
            self._orders = {key: kept for key, kept in self._orders.items() if key[0] != which} | {
                (which, epoch): order
            }
        drawn: Ids = windows[self._orders[which, epoch][place]]
        return drawn
