"""The program on a real artifact and the real engine: reproducible, streamable, and free of torch."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.artifacts import make_artifact
from tests.cli.test_law import program
from tests.tiny import make_llama


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("real")
    make_llama(folder / "model", n_ctx=4096)
    make_artifact(folder / "model", folder / "model.gguf", predictor=True, rank=16)
    return str(folder / "model.gguf")


def generate(artifact: str, *args: str) -> dict[str, object]:
    done = program("generate", artifact, "-p", "The quick brown", "--json", "-n", "16", *args)
    assert (done.returncode, done.stderr) == (0, "")
    document: dict[str, object] = json.loads(done.stdout)
    return document


def test_same_seed_same_tokens_whatever_the_threads(artifact: str) -> None:
    first = generate(artifact, "--seed", "7", "-t", "1")
    assert first["tokens"] == generate(artifact, "--seed", "7", "-t", "2")["tokens"]
    assert 0 < float(str(first["active_ratio"])) < 1


def test_running_imports_no_torch(artifact: str) -> None:
    code = (
        "import sys\nfrom powerinfer_tools.cli.main import run\n"
        f"run(['generate', {artifact!r}, '-p', 'a', '-n', '2'])\nrun(['inspect', {artifact!r}])\n"
        "print({'torch', 'transformers', 'pulp'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "set()\n"


def test_a_reader_that_leaves_is_no_error(artifact: str) -> None:
    with subprocess.Popen(
        [
            sys.executable,
            "-m",
            "powerinfer_tools.cli.main",
            "generate",
            artifact,
            "-p",
            "a",
            "-n",
            "4000",
            "--temp",
            "2",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.read(1)
        child.stdout.close()
        assert child.stderr.read() == b""
    assert child.returncode == 1


def test_ctrl_c_twice_in_a_terminal(artifact: str, tmp_path: Path) -> None:
    """The first stops the answer and the chat goes on, the second, at the prompt, ends with 130."""
    pty = pytest.importorskip("pty", reason="needs a POSIX terminal")
    process, terminal = pty.fork()
    if process == 0:
        args = ["chat", artifact, "--temp", "2", "--stop", "never"]
        os.execv(sys.executable, [sys.executable, "-m", "powerinfer_tools.cli.main", *args])
    seen = read_until(terminal, b"> ")
    os.write(terminal, b"Hello\n")
    read_until(terminal, b"Hello")
    time.sleep(0.3)
    os.write(terminal, b"\x03")
    seen = read_until(terminal, b"(stopped)")
    seen = read_until(terminal, b"> ")
    os.write(terminal, b"\x03")
    _, status = os.waitpid(process, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) in (130, -signal.SIGINT)
    assert b"Traceback" not in seen


def read_until(terminal: int, wanted: bytes) -> bytes:
    """What a terminal shows up to `wanted`."""
    seen = b""
    while wanted not in seen:
        seen += os.read(terminal, 1024)
    return seen
