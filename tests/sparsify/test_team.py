"""The command, alone and as two processes of torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from powerinfer_tools.checkpoint import open_checkpoint
from tests.sparsify.conftest import Bench

OPTIONS = "--active 0.3 --tokens 1024 --step-tokens 256 --window 32 --lr 1e-3 --precision float32 --self-generate 1000"
PROGRAM = ["-m", "powerinfer_tools.cli.main", "sparsify"]


def run(bench: Bench, launcher: list[str], output: Path, *more: str) -> "subprocess.CompletedProcess[str]":
    arguments = [str(bench.model), "--corpus", str(bench.text), "-o", str(output), *OPTIONS.split(), *more]
    return subprocess.run(
        [sys.executable, *launcher, *PROGRAM, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )


@pytest.mark.slow
def test_two_processes_train_what_one_does(bench: Bench) -> None:
    one = run(bench, [], bench.folder / "one", "--json")
    document = json.loads(one.stdout)
    assert set(document) == {"path", "chats", "perplexity_ratio", "teacher", "student"}
    assert "1024/1024 tokens, loss 0." in one.stderr
    two = run(bench, ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], bench.folder / "two")
    assert two.stdout.count("perplexity on") == 1  # only the first process speaks
    assert two.stderr.count("1024/1024 tokens") == 1
    chats = [(bench.folder / f"{name}.chats.jsonl").read_text() for name in ("one", "two")]
    assert chats[0] == chats[1]
    first, second = (open_checkpoint(bench.folder / name) for name in ("one", "two"))
    np.testing.assert_allclose(first.config.thresholds, second.config.thresholds, rtol=1e-3)
    for name in first.names():
        a, b = first.read(name), second.read(name)
        learnt = np.abs(a - bench.checkpoint.read(name)).max()
        assert np.abs(a - b).max() <= 0.05 * learnt, name
