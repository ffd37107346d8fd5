"""Texts that end an answer, found although tokens cut them."""

from collections.abc import Sequence


class Stops:
    """Passes text through until one of `stops` appears; holds back what might be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that is safe to show; `found` tells that a stop came, which is not shown, nor what follows it."""
        self._held += text
        ends = [i for stop in self._stops if (i := self._held.find(stop)) >= 0]
        if ends:
            self.found = True
            shown, self._held = self._held[: min(ends)], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        """What was held back, now that no more comes."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
