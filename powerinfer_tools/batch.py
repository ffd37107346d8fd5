"""Many requests in one file: a JSON object a line in, a JSON object a line out, in the same order."""

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from powerinfer_tools.assistant import Assistant, Settings
from powerinfer_tools.engine import Sampling
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.progress import Progress, default_progress
from powerinfer_tools.tokens import check_messages
from powerinfer_tools.tokens.template import Message

LINE = 8 << 20  # bytes of a request


@dataclass(frozen=True)
class Request:
    """One line, checked."""

    what: str | list[Message]
    settings: Settings
    system: str | None


def read_requests(path: Path) -> list[bytes]:
    """The lines of a file, or of stdin for "-", that are not blank. Errors: unreadable, a line of more than 8 MiB."""
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    except OSError as error:
        raise PowerinferError(f"{path}: {error.strerror}", "usage") from error
    lines = [line for line in data.split(b"\n") if line.strip()]
    for i, line in enumerate(lines):
        if len(line) > LINE:
            raise PowerinferError(f"{path}: request {i + 1}: expected at most {LINE >> 20} MiB, found more", "usage")
    return lines


def answers(
    assistant: Assistant,
    lines: Sequence[bytes],
    settings: Settings,
    *,
    system: str | None = None,
    raw: bool = False,
    progress: Progress | None = None,
) -> Iterator[dict[str, Any]]:
    """One record a line: Answer.document() or {"error": {"kind", "message"}}, with the request's "id" where it has one.

    settings and system hold where a request does not say otherwise.
    """
    with default_progress(progress) as draw:
        for i, line in enumerate(lines):
            yield _record(assistant, line, i + 1, settings, system, raw)
            draw("requests", i + 1, len(lines))


def _record(
    assistant: Assistant, line: bytes, number: int, settings: Settings, system: str | None, raw: bool
) -> dict[str, Any]:
    record: dict[str, Any] = {}
    try:
        fields = _fields(line)
        if "id" in fields:
            record["id"] = fields.pop("id")
        request = parse_request(fields, settings, system)
        answer = assistant.ask(request.what, request.settings, system=request.system, raw=raw)
        return record | answer.finished().document()
    except PowerinferError as error:
        return record | {"error": {"kind": error.kind, "message": f"request {number}: {error}"}}


def _fields(line: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PowerinferError(f"expected a JSON object, found {error}", "usage") from None
    if not isinstance(fields, dict):
        raise PowerinferError(f"expected a JSON object, found {type(fields).__name__}", "usage")
    return fields


def parse_request(fields: dict[str, Any], settings: Settings, system: str | None) -> Request:
    """The request that a JSON object makes. Errors: an unknown field, a wrong type or range; each names the field."""
    fields = dict(fields)
    if ("prompt" in fields) == ("messages" in fields):
        raise PowerinferError('expected one of "prompt" and "messages"', "usage")
    what = check_messages(fields.pop("messages")) if "messages" in fields else _text("prompt", fields.pop("prompt"))
    if "system" in fields:
        system = _text("system", fields.pop("system"))
    return Request(what, parse_settings(fields, settings), system)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        found = "an empty one" if value == "" else type(value).__name__
        raise PowerinferError(f"{name}: expected a text, found {found}", "usage")
    return value


def parse_settings(fields: dict[str, Any], settings: Settings) -> Settings:
    """The settings with these fields changed. Errors: an unknown field, a wrong type or range; each names the field."""
    for name, value in fields.items():
        if name not in _FIELDS:
            raise PowerinferError(f"{name}: expected one of {', '.join(_FIELDS)}", "usage")
        if not _FIELDS[name].allows(value):
            raise PowerinferError(f"{name}: expected {_FIELDS[name].expected}, found {value!r:.60}", "usage")
    changed = {**fields}
    if "stop" in changed:
        changed["stop"] = (changed["stop"],) if isinstance(changed["stop"], str) else tuple(changed["stop"])
    sampling = {name: changed.pop(name) for name in fields if name in Sampling.__dataclass_fields__}
    return replace(settings, sampling=replace(settings.sampling, **sampling), **changed)


def settings_dict(settings: Settings) -> dict[str, Any]:
    """The settings by the names of a request's fields."""
    values = {**asdict(settings), **asdict(settings.sampling)}
    return {name: values[name] for name in _FIELDS}


class _Field(NamedTuple):
    """What a field of Settings or Sampling may hold, also in words."""

    allows: Callable[[Any], bool]
    expected: str


def _number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda v: type(v) in (int, float) and math.isfinite(v) and low <= v <= high


def _integer(low: int, high: int = 2**31 - 1) -> Callable[[Any], bool]:
    return lambda v: type(v) is int and low <= v <= high


def _texts(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value))


_FIELDS = {
    "temperature": _Field(_number(0, 100), "a number in 0 .. 100"),
    "top_k": _Field(_integer(0), "an integer of 0 or more"),
    "top_p": _Field(_number(0, 1), "a number in 0 .. 1"),
    "min_p": _Field(_number(0, 1), "a number in 0 .. 1"),
    "repeat_penalty": _Field(_number(0.01, 100), "a number in 0.01 .. 100"),
    "repeat_last_n": _Field(_integer(0), "an integer of 0 or more"),
    "seed": _Field(_integer(0, 2**64 - 1), "an integer of 0 or more"),
    "max_tokens": _Field(_integer(1), "an integer of 1 or more"),
    "stop": _Field(_texts, "a text or a list of texts"),
}
