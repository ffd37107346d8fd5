"""One run of our `bench`, or of llama.cpp's `llama-bench`, in a process of its own."""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECTOR = 512  # bytes of ru_inblock
COLD_SHARE = 0.01  # of the model's bytes: a run that reads more than this from disk measures the disk
OWN_BYTES = 16 << 20  # that a program may read of itself besides
BLOCK = 16 << 20

Figures = dict[str, float]
"""Of one run, by name; "others" is the share of the machine's processor time that other programs took meanwhile."""


@dataclass(frozen=True)
class Done:
    """What a program printed, the bytes that it made the system read from disk, and how far it had the machine."""

    output: str
    bytes_read: int
    others: float


def ours(model: Path, mode: str, threads: int, prompt: int, n_decode: int, kernels: str) -> Figures:
    """Tokens per second, and what decoding read. A prompt of one token: decoding starts where llama-bench's does."""
    words: list[Any] = [sys.executable, "-m", "powerinfer_tools.cli.main", "bench", model, "--json", "-q"]
    words += ["--mode", mode, "-t", threads, "--repeats", 1, "--prompt-tokens", prompt, "--decode-tokens", n_decode]
    words += ["--kernels", kernels]
    done = run(words, model)
    found = json.loads(done.output)
    return {
        "prompt": found["prefill"]["tokens_per_s"],
        "decode": found["decode"]["tokens_per_s"],
        "bytes": found["bytes_per_token"],
        "active": found["active_ratio"],
        "ceiling": found["ceiling_gb_s"],
        "ceiling_share": found["ceiling_share"],
        "others": done.others,
    }


def theirs(program: Path, model: Path, threads: int, prompts: tuple[int, ...], n_decode: int) -> Figures:
    """Tokens per second of each prompt, as "prompt 128", and of decoding from an empty context."""
    words: list[Any] = [program, "-m", model, "-t", threads, "-n", n_decode, "-r", 1, "-o", "json"]
    words += ["-p", ",".join(map(str, prompts or (0,)))]
    done = run(words, model)
    names = {f"prompt {n}": n for n in prompts} | {"decode": 0}
    rates = {test["n_prompt"]: test["avg_ts"] for test in json.loads(done.output)}
    return {name: rates[n] for name, n in names.items()} | {"others": done.others}


def run(words: list[Any], model: Path) -> Done:
    """A run that found the model in the page cache. Fails where a second one does not, either."""
    for _ in range(2):
        done = _child([str(word) for word in words])
        if done.bytes_read <= COLD_SHARE * model.stat().st_size + OWN_BYTES:
            return done
        warm(model)
    raise SystemExit(f"{model}: {done.bytes_read} bytes came from disk: too little memory to keep it cached")


def warm(path: Path) -> None:
    """Reads the file once, so that it lies in the page cache."""
    with path.open("rb", buffering=0) as file:
        while file.read(BLOCK):
            pass


def _child(words: list[str]) -> Done:
    start, busy = time.monotonic(), _busy_seconds()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        with process.stdout as stream:
            output = stream.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            raise SystemExit(f"{' '.join(words)}: exit status {process.returncode}\n{errors.read()[-1000:]}")
    others = _busy_seconds() - busy - usage.ru_utime - usage.ru_stime
    available = (time.monotonic() - start) * (os.cpu_count() or 1)
    return Done(output, usage.ru_inblock * SECTOR, max(0.0, others / available))


def _busy_seconds() -> float:
    """Processor time since the start of the system that was not idle, what a hypervisor kept to itself included."""
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
