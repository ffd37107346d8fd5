"""Renders chat templates in a process of its own, with limits on memory and time: a sandbox stops escapes, not abuse.

Says "ready", then reads one request a line, {"template", "variables"}, and answers {"text"} or {"error"}, as JSON.
Run as a script; it imports jinja2 and nothing of this package.
"""

import json
import sys
from datetime import datetime
from typing import Any, NoReturn

MEMORY = 512 << 20  # bytes of address space
CPU = 2  # seconds a request
OUTPUT = 4 << 20  # characters of a rendering


def limit_memory() -> None:
    """Caps address space, written files and core dumps, where the system can."""
    try:
        import resource
    except ImportError:  # Windows has the parent's clock only
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def limit_time() -> None:
    """Gives the next request its seconds of CPU; the system kills this process when they are spent."""
    try:
        import resource
    except ImportError:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    spent = int(used.ru_utime + used.ru_stime) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (spent + CPU, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def environment() -> Any:
    """The environment that published templates expect (that of Hugging Face transformers)."""
    from jinja2 import Undefined, nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what the assistant said: for training, no effect here."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return body

    class Unprintable(Undefined):
        """May be tested for, not printed: a misspelt name must not pass as an empty text."""

        def __str__(self) -> str:
            return str(self._fail_with_undefined_error())

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(value: Any, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, undefined=Unprintable, extensions=[Generation, loopcontrols]
    )
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return env


def render(env: Any, template: str, variables: dict[str, Any]) -> str:
    """The rendering; stops at OUTPUT characters."""
    pieces, n = [], 0
    for piece in env.from_string(template).generate(**variables):
        n += len(piece)
        if n > OUTPUT:
            raise ValueError(f"expected at most {OUTPUT} characters, found more")
        pieces.append(piece)
    return "".join(pieces)


def answer(env: Any, request: dict[str, Any]) -> dict[str, str]:
    """The text, or in one line why there is none."""
    try:
        return {"text": render(env, request["template"], request["variables"])}
    except MemoryError:
        return {"error": f"it needs more than {MEMORY >> 20} MiB of memory"}
    except RecursionError:
        return {"error": "it is nested too deeply"}
    except Exception as error:
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}


def main() -> None:
    """Serves requests until the parent closes the pipe."""
    del sys.path[0]  # this folder: its modules are the parent's
    limit_memory()
    env = environment()
    sys.stdout.buffer.write(b"ready\n")
    sys.stdout.buffer.flush()
    for line in sys.stdin.buffer:
        limit_time()
        sys.stdout.buffer.write(json.dumps(answer(env, json.loads(line))).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
