"""How long library calls report progress: a callback, drawn by tqdm unless the caller draws it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Progress = Callable[[str, int, int], None]
"""progress(what, done, total): called after each unit; `what` names the step and its unit, e.g. "profile, layers"."""


def silent(what: str, done: int, total: int) -> None:
    """Draws nothing."""


@contextmanager
def default_progress(progress: Progress | None) -> Iterator[Progress]:
    """Yields the caller's callback, or one that draws a tqdm bar for each `what`."""
    if progress is not None:
        yield progress
        return
    from tqdm import auto

    new_bar: Any = auto.tqdm
    bars: dict[str, Any] = {}

    def draw(what: str, done: int, total: int) -> None:
        if what not in bars:
            bars[what] = new_bar(total=total, desc=what, leave=False)
        bars[what].update(done - bars[what].n)

    try:
        yield draw
    finally:
        for bar in bars.values():
            bar.close()
