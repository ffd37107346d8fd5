"""Chats that a model writes itself, both sides of them (Magpie, arXiv 2406.08464), many rows at once.

All rows begin with the template up to the user's text, and what the template puts between the turns is fed to each row
when its question ends: so all rows stay at one position, and nothing is padded.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from powerinfer_tools.checkpoint.source import Checkpoint
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.files import atomic_write
from powerinfer_tools.progress import Progress
from powerinfer_tools.sparsify.decoder import Decoder, row_bytes
from powerinfer_tools.sparsify.model import Teacher
from powerinfer_tools.sparsify.team import Team
from powerinfer_tools.tokens import Tokenizer, chat_ids
from powerinfer_tools.tokens.template import Message

CACHE_BYTES = {"cpu": 2 << 30, "cuda": 16 << 30}  # of keys and values: decides how many rows are written at once
MOST_ROWS = 1024
QUESTION, CHAT = 160, 768  # tokens at most, of a user's text and of a chat
TEMPERATURE = 0.9
MARK = "@@question@@"  # stands for the user's text while the template is taken apart

Rows = list[tuple[int, list[Message]]]
"""Chats, each with its size in tokens."""


@dataclass(frozen=True)
class Frame:
    """Token ids around a user's text: what a chat begins with, and what leads over to the answer."""

    begin: list[int]
    link: list[int]


def make_frame(checkpoint: Checkpoint, tokenizer: Tokenizer) -> Frame:
    """Takes the chat template apart. Errors: there is none, or it does not show the user's text once as it is."""
    if checkpoint.chat_template is None:
        raise PowerinferError(f"{checkpoint.path}: --self-generate needs a chat template, found none", "usage")
    ids = chat_ids(tokenizer, checkpoint.chat_template, [{"role": "user", "content": MARK}])
    text = "".join(_spelled(tokenizer, i) for i in ids)
    if text.count(MARK) != 1:
        raise PowerinferError(f"{checkpoint.path}: chat template: expected the user's text in it once", "unsupported")
    begin, link = (tokenizer.encode(part, add_bos=False, parse_special=True) for part in text.split(MARK))
    return Frame(begin, link)


def _spelled(tokenizer: Tokenizer, token: int) -> str:
    """A token's text, also that of a control token."""
    if token in tokenizer.control:
        return tokenizer.text(token)
    return tokenizer.token_bytes(token).decode("utf-8", "replace")


def self_generate(
    teacher: Teacher,
    tokenizer: Tokenizer,
    frame: Frame,
    folder: Path,
    *,
    n_tokens: int,
    seed: int,
    team: Team,
    show: Progress,
) -> list[list[Message]]:
    """Chats of n_tokens tokens in all, the same for any number of processes; the lead keeps pieces in `folder`.

    Errors: the model writes no chat.
    """
    chats: list[list[Message]] = []
    n = first = 0
    most = min(MOST_ROWS, 1 + n_tokens // (2 * QUESTION))  # for few tokens, few rows
    while n < n_tokens:
        paths = [folder / f"chats.{first + k}.json" for k in range(team.size)]
        kept = team.tell([json.loads(p.read_text()) if p.exists() else None for p in paths] if team.lead else None)
        mine = kept[team.rank] or _write_rows(teacher, tokenizer, frame, most, seed, first + team.rank)
        for path, old, rows in zip(paths, kept, team.collect(mine), strict=True):
            if team.lead and old is None:
                with atomic_write(path) as file:
                    file.write(json.dumps(rows).encode())
            for size, chat in rows:
                if n < n_tokens:
                    chats.append(chat)
                    n += size
        if n == 0:
            raise PowerinferError("--self-generate: the model writes no chats: expected questions that end, found none")
        first += team.size
        show("self-generate, tokens", min(n, n_tokens), n_tokens)
    return chats


def write_chats(path: Path, chats: list[list[Message]]) -> None:
    """A JSON line a chat: a file that --corpus takes."""
    with atomic_write(path, force=True) as file:
        for chat in chats:
            file.write(json.dumps({"messages": chat}, ensure_ascii=False).encode() + b"\n")


@dataclass
class _Row:
    """One chat as it is written: question, the frame's link, answer."""

    link: list[int]
    ends: frozenset[int]
    question: list[int] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)
    ahead: list[int] | None = None  # what is left of the link; None before the question's end
    done: bool = False

    def take(self, drawn: int) -> int:
        """The token that comes next, where the model drew this one; a row that is done changes no more."""
        if self.done:
            return drawn
        if self.ahead:
            return self.ahead.pop(0)
        if self.ahead is not None:
            self.done = drawn in self.ends
            self.answer += [] if self.done else [drawn]
            return drawn
        if drawn in self.ends or drawn == self.link[0]:
            self.ahead = self.link[1:]
            return self.link[0]
        self.question.append(drawn)
        self.done = len(self.question) > QUESTION
        return drawn


@torch.inference_mode()
def _write_rows(teacher: Teacher, tokenizer: Tokenizer, frame: Frame, most: int, seed: int, piece: int) -> Rows:
    """One batch of chats; those whose question does not end are left out."""
    length = min(CHAT, teacher.config.n_ctx)
    n_rows = max(1, min(most, CACHE_BYTES[teacher.device] // row_bytes(teacher, length)))
    mixed = np.random.SeedSequence([seed, piece]).generate_state(1)[0]  # torch looks at 32 bits of a seed alone
    generator = torch.Generator(teacher.device).manual_seed(int(mixed))
    rows = [_Row(frame.link, tokenizer.control) for _ in range(n_rows)]
    live = list(rows)
    with teacher.precision():
        decoder = Decoder(teacher, length)
        logits = decoder.begin(frame.begin, n_rows)
        for _ in range(len(frame.begin), length):
            drawn = _draw(logits.float() / TEMPERATURE, generator).tolist()
            fed = [row.take(token) for row, token in zip(live, drawn, strict=True)]
            going = [i for i, row in enumerate(live) if not row.done]
            if not going:
                break
            if len(going) <= 0.75 * len(live):
                decoder.keep(going)
                live, fed = [live[i] for i in going], [fed[i] for i in going]
            logits = decoder.step(fed)
    n_frame = len(frame.begin) + len(frame.link)
    return [(n_frame + len(row.question) + len(row.answer), chat) for row in rows if (chat := _chat(row, tokenizer))]


def _draw(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A token a row of [rows, n_vocab], with the probability of its softmax: where the running sum passes a number."""
    passed = logits.softmax(-1).cumsum(-1)
    number = torch.rand(len(logits), 1, generator=generator, device=logits.device) * passed[:, -1:]
    return torch.searchsorted(passed, number, right=True)[:, 0].clamp(max=logits.shape[1] - 1)


def _chat(row: _Row, tokenizer: Tokenizer) -> list[Message] | None:
    texts = [tokenizer.decode(ids).strip() for ids in (row.question, row.answer)]
    if not all(texts):
        return None
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)]
