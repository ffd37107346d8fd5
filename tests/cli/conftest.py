"""The program run in this process, and a model whose answers are written down."""

import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from powerinfer_tools.cli.main import run
from powerinfer_tools.tokens import Tokenizer
from tests.tiny import TEMPLATE
from tests.tokens.conftest import SPECIAL, byte_level_json

INTERRUPT = "\x03"  # in an answer: here the user presses Ctrl-C


@dataclass(frozen=True)
class Result:
    """What a run left."""

    code: int
    out: str
    err: str


@dataclass
class FakeEngine:
    """Says the next of `answers` after each prompt, then ends; remembers the prompts."""

    tokenizer: Tokenizer
    answers: list[str]
    ctx_size: int = 200
    threads: int = 1
    prompts: list[str] = field(default_factory=list)
    closed: bool = False
    _ids: list[int] = field(default_factory=list)
    _say: list[int] = field(default_factory=list)
    _prefilled: int = 0

    info = SimpleNamespace(weight_bytes=1 << 20, card_bytes=0)

    @property
    def position(self) -> int:
        return len(self._ids)

    def seed(self, seed: int) -> None:
        self.last_seed = seed

    def truncate(self, n: int) -> None:
        del self._ids[n:]

    def prefill(self, tokens: Sequence[int]) -> None:
        self._prefilled += len(tokens)
        self._ids += tokens
        self.prompts.append("".join(self.tokenizer.text(i) for i in self._ids).replace("Ċ", "\n").replace("Ġ", " "))
        answer = self.answers.pop(0)
        self._say = [*self.tokenizer.encode(answer, add_bos=False, parse_special=False), self.tokenizer.eos[0]]

    def decode(self, token: int) -> None:
        self._ids.append(token)
        if self.tokenizer.decode([token]) == INTERRUPT:
            raise KeyboardInterrupt

    def sample(self, sampling: Any, recent: Sequence[int]) -> int:
        self.last_sampling = sampling
        return self._say.pop(0)

    def reset_stats(self) -> None:
        self._prefilled = 0

    def stats(self) -> Any:
        return SimpleNamespace(active_ratio=0.25, n_prefill=self._prefilled)

    def memory(self) -> tuple[int, int]:
        return 1024, 2048

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def powerinfer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Result]:
    """Runs the program in an empty folder: powerinfer("generate", …, stdin="…")."""
    monkeypatch.chdir(tmp_path)

    def call(*args: object, stdin: str = "") -> Result:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8"))
        code = run([str(arg) for arg in args])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(byte_level_json(), SPECIAL)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> Callable[..., FakeEngine]:
    """model("answer", …, template=…, ctx_size=…): every artifact is now this model."""
    from powerinfer_tools import assistant

    def make(*answers: str, template: str | None = TEMPLATE, ctx_size: int = 200) -> FakeEngine:
        engine = FakeEngine(tokenizer, list(answers), ctx_size)
        artifact = SimpleNamespace(
            config=SimpleNamespace(name="fake"),
            quant="f32",
            n_bytes=1 << 20,
            chat_template=template,
            tokenizer_json=byte_level_json(),
            special=SPECIAL,
        )
        monkeypatch.setattr(assistant, "open_artifact", lambda path: artifact)
        monkeypatch.setattr(assistant, "Engine", lambda path, **how: engine)
        return engine

    return make
