"""All that a person sees: stdout carries data, everything else goes to stderr."""

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from powerinfer_tools.progress import Progress

if TYPE_CHECKING:
    from powerinfer_tools.assistant import Answer, Timings

console = Console(stderr=True, highlight=False, markup=False, emoji=False)
"""stderr; `-q` makes it quiet."""

LINE_EVERY = 10.0  # seconds between progress lines where stderr is no terminal


# what a terminal would obey rather than show: all control characters but tab, newline and carriage return
_OBEYED = {c: "\ufffd" for c in [*range(32), 127, *range(128, 160)] if chr(c) not in "\t\n\r"}


def harmless(text: str) -> str:
    """The text without what a terminal would obey: names and texts come from files and models."""
    return text.translate(_OBEYED)


def say(text: str = "", style: str | None = None) -> None:
    """One line on stderr, never folded; nothing with -q."""
    console.print(harmless(text), style=style, soft_wrap=True)


def write(text: str) -> None:
    """Text on stdout at once; on a terminal without control characters, which a model or a file may hold."""
    sys.stdout.write(harmless(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def print_json(document: dict[str, Any]) -> None:
    """The one JSON document of a `--json` command, on stdout: one line, or indented on a terminal."""
    indent = 2 if sys.stdout.isatty() else None
    print(json.dumps(document, ensure_ascii=False, allow_nan=False, indent=indent), flush=True)


def wrote(path: Path, next_command: str | None = None) -> None:
    """Says what was written, its size and what to run next."""
    say(f"wrote {path} ({size(path.stat().st_size)})")
    if next_command:
        say(f"next: {next_command}", style="cyan")


def size(n_bytes: float) -> str:
    """Bytes for people: 512 B, 1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024 or unit == "GiB":
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    raise AssertionError


def timings(answer: "Answer") -> str:
    """One line about speed and sparsity."""
    n, m = len(answer.prompt), len(answer.tokens) - 1
    rate = f" ({m / answer.decode_s:.1f} tok/s)" if m > 0 and answer.decode_s > 0 else ""
    return (
        f"prompt {n} tokens, first token after {answer.first_token_s:.2f} s; answer {m + 1} tokens{rate}; "
        f"active neurons {100 * answer.active_ratio:.1f} %; ended by {answer.finish_reason or 'interruption'}"
    )


@contextmanager
def llama_timings(timings: "Timings", wanted: bool) -> Iterator[None]:
    """Prints the timings on stderr at the end, however it comes, if they are wanted: then with -q, too."""
    try:
        yield
    finally:
        if wanted:
            print(llama_lines(timings, time.perf_counter() - timings.started), file=sys.stderr, flush=True)


def llama_lines(timings: "Timings", total_s: float) -> str:
    """What llama.cpp's llama_print_timings prints, to the letter: scripts look for it."""
    lines = [f"{'load':>11} time = {1e3 * timings.load_s:10.2f} ms"]
    for what, seconds, n, unit in (
        ("sample", timings.sample_s, timings.n_sample, "runs  "),
        ("prompt eval", timings.prompt_s, timings.n_prompt, "tokens"),
        ("eval", timings.decode_s, timings.n_decode, "runs  "),
    ):
        rate = n / seconds if seconds else 0.0
        each = f"({1e3 * seconds / max(n, 1):8.2f} ms per token, {rate:8.2f} tokens per second)"
        lines.append(f"{what:>11} time = {1e3 * seconds:10.2f} ms / {n:5d} {unit} {each}")
    lines.append(f"{'total':>11} time = {1e3 * total_s:10.2f} ms")
    return "\n".join(["", *(f"llama_print_timings: {line}" for line in lines)])


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on stdout: the first column left, the others right; all left where no column has a name."""
    from rich.table import Table
    from rich.text import Text

    width = None if sys.stdout.isatty() or os.environ.get("COLUMNS") else 160
    out = Console(highlight=False, markup=False, emoji=False, width=width)
    if title:
        out.print(Text(harmless(title), style="bold"), soft_wrap=True)  # a table's own title folds at its width
    view = Table(box=None, pad_edge=False)
    view.show_header = any(columns)
    for i, column in enumerate(columns):
        view.add_column(
            column, justify="left" if i == 0 or not any(columns) else "right", header_style="bold", overflow="fold"
        )
    for row in rows:
        view.add_row(*(Text(harmless(str(cell))) for cell in row))
    out.print(view)


@contextmanager
def progress() -> Iterator[Progress]:
    """Yields progress(what, done, total): bars on a terminal, else a line every 10 s and at the end."""
    if console.quiet:
        yield lambda what, done, total: None
    elif console.is_terminal:
        with _bars() as draw:
            yield draw
    else:
        yield _lines()


@contextmanager
def _bars() -> Iterator[Progress]:
    from rich import progress as rich_progress

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=console) as bars:
        tasks: dict[str, rich_progress.TaskID] = {}

        def draw(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield draw


def _lines() -> Progress:
    started: dict[str, float] = {}
    printed: dict[str, float] = {}

    def draw(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        started.setdefault(what, now)
        if done >= total or now - printed.setdefault(what, now) >= LINE_EVERY:
            printed[what] = now
            say(f"{what}: {done}/{total}, {now - started[what]:.0f} s")

    return draw
