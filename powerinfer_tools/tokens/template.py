"""Chat templates: programs that come with a model, rendered by a limited child process (template_child)."""

import atexit
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from threading import Lock, Timer
from typing import Any

from powerinfer_tools.errors import PowerinferError

TEMPLATE = 256 << 10  # bytes of a template
REQUEST = 8 << 20  # bytes of a request
ANSWER = 32 << 20  # bytes of an answer: template_child.OUTPUT characters, escaped
SECONDS, START_SECONDS = 2.5, 30.0  # by the wall clock, for one rendering and for the child's start

Message = dict[str, Any]


def render_chat(
    template: str, messages: Sequence[Message], special: dict[str, str], add_generation_prompt: bool
) -> str:
    """The conversation as one text. special: variables that templates expect, such as bos_token and eos_token.

    Errors: the template is too large, fails, prints what is not defined, or takes too much time or memory.
    """
    if len(template.encode("utf-8", "replace")) > TEMPLATE:
        raise _refused(f"expected at most {TEMPLATE >> 10} KiB of template, found {len(template) >> 10} KiB")
    variables = {**special, "messages": list(messages), "add_generation_prompt": add_generation_prompt}
    request = json.dumps({"template": template, "variables": variables}).encode() + b"\n"
    if len(request) > REQUEST:
        raise _refused(f"expected at most {REQUEST >> 20} MiB of messages, found {len(request) >> 20} MiB")
    with _lock:
        answer = _child.ask(request)
    if "error" in answer:
        raise _refused(answer["error"])
    return str(answer["text"])


def _refused(reason: str) -> PowerinferError:
    return PowerinferError(
        f"the model's chat template was refused: {reason}; use --chat-template FILE or --no-chat-template",
        "malformed",
    )


class _Child:
    """The rendering process: started when first needed, and again after it had to be killed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: bytes) -> dict[str, str]:
        """The child's answer, or an error if it gave none in time."""
        process = self._running()
        try:
            line = _exchange(process, request, SECONDS)
        except BaseException:  # Ctrl-C: the answer must not be taken for the next request's
            self.close()
            raise
        if line.endswith(b"\n"):
            answer: dict[str, str] = json.loads(line)
            return answer
        self.close()
        return {"error": "it takes too much time or memory"}

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            script = Path(__file__).with_name("template_child.py")
            self._process = subprocess.Popen(
                [sys.executable, str(script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the parent
            )
            if _exchange(self._process, b"", START_SECONDS) != b"ready\n":
                self.close()
                raise PowerinferError("the process that renders chat templates does not start", "internal")
        return self._process

    def close(self) -> None:
        """Ends the child, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _exchange(process: subprocess.Popen[bytes], request: bytes, seconds: float) -> bytes:
    """The line that answers a request; incomplete or empty where the process ended or had to be ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    clock = Timer(seconds, process.kill)
    clock.start()
    try:
        process.stdin.write(request)
        process.stdin.flush()
        return process.stdout.readline(ANSWER)
    except BrokenPipeError:
        return b""
    finally:
        clock.cancel()


_child = _Child()
_lock = Lock()
atexit.register(_child.close)
