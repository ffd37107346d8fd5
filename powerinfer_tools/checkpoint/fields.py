"""Checked access to the fields of files that others wrote: every number has a type and a range."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from powerinfer_tools.errors import PowerinferError

LARGEST = 1 << 24  # no size of a model that this project reads is larger


def read_text(path: Path, limit: int) -> str:
    """The file's text, at most `limit` bytes. Errors: missing, larger, not UTF-8."""
    if not path.is_file():
        raise PowerinferError(f"{path}: expected this file, found none")
    size = path.stat().st_size
    if size > limit:
        raise PowerinferError(f"{path}: expected at most {limit} bytes, found {size}", "malformed")
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise PowerinferError(f"{path}: expected UTF-8, found byte {error.start} to be none", "malformed") from error


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """The object that a JSON file holds. Errors: too large, not JSON, nested too deeply, no object."""
    try:
        value = json.loads(read_text(path, limit))
    except RecursionError as error:
        raise PowerinferError(f"{path}: expected JSON, found it nested too deeply", "malformed") from error
    except json.JSONDecodeError as error:
        raise PowerinferError(f"{path}: expected JSON, found {error}", "malformed") from error
    if not isinstance(value, dict):
        raise PowerinferError(f"{path}: expected a JSON object, found {type(value).__name__}", "malformed")
    return value


class Fields:
    """The fields of one object; an error names the place, the field, what was expected and what was found.

    A field that is missing or null takes the default; without a default it is required. prefix: before every key.
    """

    def __init__(self, where: str, values: Mapping[str, Any], prefix: str = "") -> None:
        self.where, self.values, self.prefix = where, values, prefix

    def __contains__(self, key: str) -> bool:
        return self.get(key) is not None

    def get(self, key: str, default: Any = None) -> Any:
        """The field as it is, not checked."""
        value = self.values.get(self.prefix + key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None, low: int = 1, high: int = LARGEST) -> int:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, f"an integer in {low}..{high}", value)
        return value

    def number(self, key: str, default: float | None = None, low: float = 0.0, high: float = 1e12) -> float:
        """A finite number, low < number <= high."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(key, "a number", value)
        if not low < value <= high:
            raise self.error(key, f"a number above {low:g}, at most {high:g}", value)
        return float(value)

    def flag(self, key: str, default: bool | None = None) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "true or false", value)
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self.get(key, default)
        if not isinstance(value, str):
            raise self.error(key, "a string", value)
        return value

    def choice(self, key: str, known: Iterable[str], default: str | None = None) -> str:
        """A text that this program knows."""
        value = self.text(key, default)
        if value not in known:
            raise self.error(key, f"one of {', '.join(known)}", value, "unsupported")
        return value

    def error(self, key: str, expected: str, found: object, kind: str = "mismatch") -> PowerinferError:
        """To be raised: the field is not what was expected."""
        shown = "nothing" if found is None else repr(found)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return PowerinferError(f"{self.where}: {self.prefix}{key}: expected {expected}, found {shown}", kind)

    def unsupported(self, key: str, expected: str) -> PowerinferError:
        """To be raised: the field says something that this program does not compute."""
        return self.error(key, expected, self.get(key), "unsupported")
