"""Token ids of a text, and the text of token ids, by the model's own tokenizer.json."""

import codecs
import json
import re
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.tokens.library import load_tokenizer

BREAK, EDGE = "\ufdd0", "\ufdd1"
"""Noncharacters, not encoded. No token spans BREAK, so it takes the effect from a control token's text."""

_SURROGATE = re.compile(r"[\ud800-\udfff]")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """Encodes and decodes. special: {"bos": id or None, "eos": [ids], "add_bos": bool, ...} of the checkpoint."""

    def __init__(self, tokenizer_json: str, special: dict[str, Any]) -> None:
        self._tokenizer = load_tokenizer(tokenizer_json, "tokenizer.json")
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        description = json.loads(tokenizer_json)
        self._form = _Form(description.get("decoder"))
        self._added = {t["id"]: t["content"] for t in description.get("added_tokens") or []}
        self._cache: dict[int, bytes] = {}
        self.n_vocab: int = self._tokenizer.get_vocab_size()
        self.bos: int | None = special.get("bos")
        self.eos: list[int] = list(special.get("eos") or [])
        self.add_bos = bool(special.get("add_bos")) and self.bos is not None
        flagged: set[int] = {t["id"] for t in description.get("added_tokens") or [] if t.get("special")}
        if self.bos is not None:
            flagged.add(self.bos)
        self.control: frozenset[int] = frozenset(flagged | set(self.eos))
        """Ids that mean something to the model and are no text."""

    @cached_property
    def control_texts(self) -> tuple[str, ...]:
        """How control tokens are written, the longest first."""
        texts = {self._tokenizer.id_to_token(i) for i in self.control} - {None, ""}
        return tuple(sorted(texts, key=lambda text: (-len(text), text)))

    def encode(self, text: str, add_bos: bool, parse_special: bool) -> list[int]:
        """The ids of a text. add_bos: begin with bos if the model wants it.

        parse_special: control tokens that the text spells become themselves, except where BREAK splits them;
        else they are text like any other.
        """
        text = _SURROGATE.sub("\ufffd", text)  # what Python makes of bytes that are no UTF-8
        ids = [self.bos] if add_bos and self.add_bos and self.bos is not None else []
        for part in text.split(BREAK):
            ids += self._encode(part) if parse_special else self._encode_plain(part)
        return ids

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        self._tokenizer.encode_special_tokens = True
        try:
            encoded = self._tokenizer.encode(text, add_special_tokens=False)
            if self.control.isdisjoint(encoded.ids):
                return list(encoded.ids)
            # a vocabulary may spell a control token as a piece of text: split it until it does not
            parts = self.broken(text).split(BREAK)
            return [i for part in parts for i in self._tokenizer.encode(part, add_special_tokens=False).ids]
        finally:
            self._tokenizer.encode_special_tokens = False

    def broken(self, text: str) -> str:
        """The text with BREAK inside everything that spells a control token."""
        return self._spelled.sub(lambda match: text[match.start()] + BREAK, text)

    def guarded(self, text: str) -> str:
        """`broken`, and EDGE at an end that could become part of a control token: "<|im_" before "end|>"."""
        body = text.strip()
        ahead = any(body.startswith(c[k:]) for c in self.control_texts for k in range(1, len(c)))
        behind = any(body.endswith(c[:k]) for c in self.control_texts for k in range(1, len(c)))
        return text.replace(body, EDGE * ahead + self.broken(body) + EDGE * behind) if body else text

    def settled(self, text: str) -> str:
        """A text made of guarded ones: EDGE becomes BREAK where joining them spells a control token, else nothing."""
        joined = text.replace(EDGE, "")
        same = len(self._spelled.findall(joined)) == len(self._spelled.findall(text))
        return joined if same else text.replace(EDGE, BREAK)

    @cached_property
    def _spelled(self) -> re.Pattern[str]:
        # the first character of each, looking ahead, so that overlapping ones are found
        spelled = "|".join(map(re.escape, self.control_texts))
        return re.compile(f"(?={spelled or '(?!)'}).", re.DOTALL)

    def text(self, token: int | None) -> str:
        """How one token is written in templates; nothing for None."""
        return "" if token is None else self._tokenizer.id_to_token(token) or ""

    def token_bytes(self, token: int) -> bytes:
        """The bytes of text that one id stands for: none for control tokens and for ids without a token."""
        if token not in self._cache:
            self._cache[token] = self._token_bytes(token)
        return self._cache[token]

    def _token_bytes(self, token: int) -> bytes:
        if not 0 <= token < 2**31 or token in self.control:
            return b""
        if token in self._added:
            return str(self._added[token]).encode("utf-8", "replace")
        return self._form.to_bytes(self._tokenizer.id_to_token(token) or "")

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, from the text's beginning; total: every id gives something or nothing, none fails."""
        stream = self.stream()
        return "".join(map(stream.push, ids)) + stream.flush()

    def stream(self, continuing: bool = False) -> "Stream":
        """A decoder that takes ids one at a time. continuing: text goes before, so its first space counts."""
        return Stream(self, strip=self._form.strip_first and not continuing)


class Stream:
    """Turns ids into text as they come, and never gives out a part of a character."""

    def __init__(self, tokenizer: Tokenizer, strip: bool) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = strip

    def push(self, token: int) -> str:
        """The text that is complete with this id; may be empty."""
        return self._first(self._decoder.decode(self._tokenizer.token_bytes(token)))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for the beginning of a character that never ended."""
        return self._first(self._decoder.decode(b"", True))

    def _first(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text


class _Form:
    """How the tokens of a vocabulary spell bytes, as the decoder of tokenizer.json says.

    Byte-level BPE writes each byte as a printable character; SentencePiece writes a space as ▁, bytes as <0xNN>, and
    puts a space before the text, which the decoder takes off.
    """

    def __init__(self, decoder: dict[str, Any] | None) -> None:
        steps = _flatten(decoder)
        self._byte_level = any(step["type"] == "ByteLevel" for step in steps)
        self._byte_tokens = any(step["type"] == "ByteFallback" for step in steps)
        self._replace = [pair for step in steps if (pair := _replacement(step))]
        self.strip_first = any(_strips(step) for step in steps)

    def to_bytes(self, token: str) -> bytes:
        if self._byte_level and all(c in _BYTES for c in token):
            return bytes(_BYTES[c] for c in token)
        if self._byte_tokens and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        for old, new in self._replace:
            token = token.replace(old, new)
        return token.encode("utf-8", "replace")


_DECODERS = ("ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip")


def _flatten(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The decoder's steps in order; refuses those whose effect on single tokens is not known here."""
    if decoder is None:
        return []
    if decoder.get("type") == "Sequence":
        return [step for part in decoder["decoders"] for step in _flatten(part)]
    if decoder.get("type") not in _DECODERS:
        known = ", ".join(_DECODERS)
        raise PowerinferError(
            f"tokenizer.json: decoder.type: expected one of {known}, found {decoder.get('type')}", "unsupported"
        )
    return [decoder]


def _replacement(step: dict[str, Any]) -> tuple[str, str] | None:
    if step["type"] == "Metaspace":
        return step.get("replacement", "▁"), " "
    if step["type"] == "Replace" and "String" in step["pattern"]:
        return step["pattern"]["String"], step["content"]
    return None


def _strips(step: dict[str, Any]) -> bool:
    if step["type"] == "Metaspace":
        return bool(step.get("add_prefix_space", step.get("prepend_scheme", "always") != "never"))
    return bool(step["type"] == "Strip" and step.get("content") == " " and step.get("start", 0) > 0)


def _byte_characters() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 characters stand for their own byte, U+0100 on for the others in order."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in own]
    return {chr(b): b for b in own} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTES = _byte_characters()
