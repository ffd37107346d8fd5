"""From messages to an answer: artifact, tokenizer, chat template and engine together. What chat and generate share."""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from powerinfer_tools.artifact.read import Artifact, open_artifact
from powerinfer_tools.engine import Engine, Model, Sampling, Token, generate
from powerinfer_tools.engine.generate import Context
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.placement.limits import open_within
from powerinfer_tools.tokens import Stops, Tokenizer, chat_ids
from powerinfer_tools.tokens.chat import PLAIN_STOPS
from powerinfer_tools.tokens.template import TEMPLATE, Message

MODES = {"sparse": "auto", "dense": "dense"}
ROOM = 256  # tokens kept free for an answer in a chat, where the context has four times as many


@dataclass(frozen=True)
class Settings:
    """How an answer is made. max_tokens None: until the model ends or the context is full."""

    sampling: Sampling
    seed: int
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()


@dataclass
class Timings:
    """What an assistant's time went into since `started`, in seconds, and the tokens that each part handled."""

    started: float = field(default_factory=time.perf_counter)
    load_s: float = 0.0
    sample_s: float = 0.0
    n_sample: int = 0
    prompt_s: float = 0.0
    n_prompt: int = 0
    decode_s: float = 0.0
    n_decode: int = 0

    def count(self, token: Token, n_prompt: int) -> None:
        """Adds a drawn token; n_prompt: tokens of a prompt that ran before it, 0 where one token was decoded."""
        self.sample_s += token.sample_s
        self.n_sample += 1
        if n_prompt:
            self.prompt_s += token.seconds - token.sample_s
            self.n_prompt += n_prompt
        else:
            self.decode_s += token.seconds - token.sample_s
            self.n_decode += 1


class Assistant:
    """A model that answers. template: text of a chat template, None for plain "User: … Assistant:" lines."""

    def __init__(
        self, artifact: Artifact, tokenizer: Tokenizer, engine: Engine, template: str | None, timings: Timings
    ) -> None:
        self.artifact, self.tokenizer, self.engine, self.template = artifact, tokenizer, engine, template
        self.timings = timings
        self._context = Context()

    def __enter__(self) -> "Assistant":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.engine.close()

    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """The conversation's ids, ready for the assistant's turn."""
        return chat_ids(self.tokenizer, self.template, messages)

    def raw_prompt(self, text: str) -> list[int]:
        """The text's ids as they are: control tokens that it spells count."""
        return self.tokenizer.encode(text, add_bos=True, parse_special=True)

    def fitting_prompt(self, messages: Sequence[Message]) -> tuple[list[int], int]:
        """As chat_prompt, without the oldest turns where the context would leave no room for an answer.

        Returns the ids and how many messages were left out; system messages stay.
        """
        system = [m for m in messages if m["role"] == "system"]
        turns = [m for m in messages if m["role"] != "system"]
        size = self.engine.ctx_size
        limit = size - min(ROOM, size // 4)
        dropped = 0
        prompt = self.chat_prompt(messages)
        while len(prompt) > limit and len(turns) - dropped > 2:
            dropped += 2  # what was asked and what was answered
            prompt = self.chat_prompt(system + turns[dropped:])
        return prompt, dropped

    def ask(
        self, what: str | list[Message], settings: Settings, *, system: str | None = None, raw: bool = False
    ) -> "Answer":
        """An answer to a text or a conversation. raw: the text is continued as it is. Errors: the template refuses."""
        if raw and isinstance(what, str):
            return self.answer(self.raw_prompt(what), settings, continuing=True)
        messages = [{"role": "user", "content": what}] if isinstance(what, str) else what
        if system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        return self.answer(self.chat_prompt(messages), settings)

    def answer(self, prompt: list[int], settings: Settings, *, continuing: bool = False) -> "Answer":
        """An answer to iterate over. continuing: it goes on with the prompt's text, as no chat does."""
        if self.template is None and not continuing:
            settings = replace(settings, stop=(*settings.stop, *PLAIN_STOPS))
        tokens = generate(
            self.engine,
            prompt,
            settings.sampling,
            max_tokens=settings.max_tokens or self.engine.ctx_size,
            stop_ids=self.tokenizer.eos,
            seed=settings.seed,
            context=self._context,
        )
        return Answer(self, prompt, tokens, settings.stop, continuing)


class Answer:
    """Pieces of text as they come; the fields hold what has come so far, also after an interruption.

    tokens: every id that was drawn; finish_reason: stop or length, None while unfinished; seconds: of the prompt up to
    the first token, of the tokens after it, and from the start to the first token.
    """

    def __init__(
        self,
        assistant: Assistant,
        prompt: list[int],
        tokens: Iterator[Token],
        stop: Sequence[str],
        continuing: bool,
    ) -> None:
        self.prompt, self.tokens, self.text = prompt, list[int](), ""
        self.finish_reason: str | None = None
        self.prefill_s = self.decode_s = self.first_token_s = self.active_ratio = 0.0
        self._assistant, self._source, self._stops = assistant, tokens, Stops(stop)
        self._stream = assistant.tokenizer.stream(continuing)

    def __iter__(self) -> Generator[str, None, None]:
        engine, start = self._assistant.engine, time.perf_counter()
        engine.reset_stats()
        try:
            for token in self._source:
                if not self.tokens:
                    self.prefill_s, self.first_token_s = token.seconds, time.perf_counter() - start
                else:
                    self.decode_s += token.seconds
                self._assistant.timings.count(token, 0 if self.tokens else engine.stats().n_prefill)
                self.tokens.append(token.id)
                self.finish_reason = token.finish_reason
                yield self._show(self._stops.push(self._stream.push(token.id)))
                if self._stops.found:
                    self.finish_reason = "stop"
                    return
            last = self._stops.push(self._stream.flush())
            yield self._show(last if self._stops.found else last + self._stops.flush())
        finally:
            self.active_ratio = engine.stats().active_ratio

    def _show(self, text: str) -> str:
        self.text += text
        return text

    def finished(self) -> "Answer":
        """Itself, when all of it has come."""
        for _ in self:
            pass
        return self

    def document(self) -> dict[str, Any]:
        """What `generate --json` prints."""
        return {
            "text": self.text,
            "tokens": self.tokens,
            "prompt_tokens": self.prompt,
            "finish_reason": self.finish_reason,
            "timings": {
                "prefill_s": round(self.prefill_s, 6),
                "decode_s": round(self.decode_s, 6),
                "first_token_s": round(self.first_token_s, 6),
            },
            "active_ratio": round(self.active_ratio, 6),
        }


def open_assistant(
    path: Path,
    *,
    ctx_size: int | None = None,
    threads: int | None = None,
    mode: str = "sparse",
    ram: int | None = None,
    vram: int = 0,
    template_file: Path | None = None,
    use_template: bool = True,
    say: Callable[[str], None] | None = None,
) -> Assistant:
    """Opens an artifact for answering.

    mode: sparse or dense; ram, vram: bytes to stay within, of memory and of a card; template_file: a template instead
    of the artifact's; say: takes notes.
    """
    timings = Timings()
    artifact = open_artifact(path)
    template = _read_template(template_file) if template_file else artifact.chat_template
    tokenizer = Tokenizer(artifact.tokenizer_json, artifact.special)  # first: what the budget counts, too
    model: Path | Model = path
    if ram is not None or vram:
        dense = mode == "dense"
        model = open_within(artifact, ram, vram, ctx_size=ctx_size, threads=threads, dense=dense, say=say).model
    engine = Engine(model, ctx_size=ctx_size, threads=threads, mode=MODES[mode])
    timings.load_s = time.perf_counter() - timings.started
    return Assistant(artifact, tokenizer, engine, template if use_template else None, timings)


def _read_template(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(TEMPLATE + 1)
        if len(data) > TEMPLATE:
            raise PowerinferError(f"{path}: expected at most {TEMPLATE >> 10} KiB of template, found more", "usage")
        return data.decode("utf-8")
    except OSError as error:
        raise PowerinferError(f"{path}: {error.strerror}", "usage") from error
    except UnicodeDecodeError as error:
        raise PowerinferError(f"{path}: expected UTF-8, found byte {error.start} that is none", "usage") from error
