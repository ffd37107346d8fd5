"""The program on a real artifact and the real engine: reproducible, streamable, and free of torch."""

import json
import os
import re
import subprocess
import sys
import time

import pytest

from tests.artifacts import make_artifact
from tests.cli.test_law import program
from tests.tiny import make_llama


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of random weights that no token ends."""
    folder = tmp_path_factory.mktemp("real")
    make_llama(folder / "model", n_ctx=4096)
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / "model" / name
        values = json.loads(path.read_text())
        path.write_text(json.dumps({key: value for key, value in values.items() if "eos" not in key}))
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


def test_timings_add_up(artifact: str) -> None:
    done = program("generate", artifact, "-p", "The quick brown", "--json", "-n", "16", "--timings")
    document = json.loads(done.stdout)
    counts = [int(n) for n in re.findall(r"ms / +(\d+) ", done.stderr)]
    assert counts == [16, len(document["prompt_tokens"]), 15]
    *parts, total = (float(ms) for ms in re.findall(r"time = +([\d.]+) ms", done.stderr))
    assert len(parts) == 4
    assert min(parts) > 0
    assert sum(parts) <= total + 0.05  # each is rounded
    seconds = document["timings"]["prefill_s"] + document["timings"]["decode_s"]
    assert sum(parts[1:]) == pytest.approx(1000 * seconds, abs=0.05)


def test_running_imports_no_torch(artifact: str) -> None:
    code = (
        "import sys\nfrom powerinfer_tools.cli.main import run\n"
        f"run(['generate', {artifact!r}, '-p', 'a', '-n', '2'])\nrun(['inspect', {artifact!r}])\n"
        "print({'torch', 'transformers', 'pulp'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "set()\n"


def test_bytes_that_are_no_text(artifact: str) -> None:
    command = [sys.executable, "-m", "powerinfer_tools.cli.main"]
    for args in (["generate", artifact, "-n", "2", "--raw", "--json"], ["chat", artifact, "-n", "2", "--json"]):
        done = subprocess.run([*command, *args], input=b"a\xff\xfeb\n", capture_output=True, check=False)
        assert done.returncode == 0
        assert json.loads(done.stdout)
    missing = subprocess.run([*command, "inspect", b"\xff\x1b[31m", "--json"], capture_output=True, check=False)
    assert missing.returncode == 2
    assert json.loads(missing.stdout)["error"]["kind"] == "usage"
    assert b"\x1b" not in missing.stderr


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


@pytest.mark.timeout(120)
def test_ctrl_c_twice_in_a_terminal(artifact: str) -> None:
    """The first stops the answer and the chat goes on, the second, at the prompt, ends with 130."""
    pty = pytest.importorskip("pty", reason="needs a POSIX terminal")
    process, file = pty.fork()
    if process == 0:
        os.execv(sys.executable, [sys.executable, "-m", "powerinfer_tools.cli.main", "chat", artifact])
    terminal = Terminal(file)
    terminal.until(b"> ")
    os.write(file, b"Hello\n")
    terminal.until(b"Hello\r\n")
    terminal.more(20)  # of the answer
    os.write(file, b"\x03")
    terminal.until(b"(stopped)")
    terminal.until(b"> ")
    while (ended := os.waitpid(process, os.WNOHANG))[0] == 0:
        os.write(file, b"\x03")  # again: one that comes while readline sets the terminal up is lost
        time.sleep(0.2)
    os.close(file)
    assert os.waitstatus_to_exitcode(ended[1]) == 130
    assert b"Traceback" not in terminal.seen


class Terminal:
    """What a program shows, waited for piece by piece."""

    def __init__(self, file: int) -> None:
        self.file, self.seen, self._at = file, b"", 0

    def until(self, wanted: bytes) -> None:
        while (found := self.seen.find(wanted, self._at)) < 0:
            self.seen += os.read(self.file, 1024)
        self._at = found + len(wanted)

    def more(self, n: int) -> None:
        while len(self.seen) < self._at + n:
            self.seen += os.read(self.file, 1024)
        self._at += n
