"""--patch: every stage takes a patched model, and names it for the next one."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from powerinfer_tools.checkpoint import Merged, open_checkpoint
from powerinfer_tools.checkpoint.patch import write_patch
from powerinfer_tools.placement.machine import Machine, Tier, write_machine
from tests.cli.conftest import Result
from tests.tiny import CORPUS, make_llama

Program = Callable[..., Result]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A silu model; text, machine and the patch lie beside it."""
    model = make_llama(tmp_path / "model", n_embd=32, n_ff=64, activation="silu")
    (tmp_path / "text.txt").write_text(CORPUS * 10)
    write_machine(Machine("test", 2, Tier(8 << 30, 2e10, ((1 << 10, 1e10), (1 << 16, 2e10)))), tmp_path / "machine")
    learnt = {"blk.0.ffn_norm.weight": np.full(32, 0.5, np.float32)}
    write_patch(tmp_path / "p", Merged(open_checkpoint(model), "silu", (0.1, 0.2), learnt))
    return model


def test_every_stage_takes_it_and_says_so(powerinfer: Program, model: Path) -> None:
    """Each command but the last names the next one, which runs as it stands."""
    digest = open_checkpoint(model, patch=Path("p")).digest()
    first = ["profile", "model", "--patch", "p", "--corpus", "text.txt", "--tokens", "512", "-o", "m.activations"]
    train = following(powerinfer(*first))
    assert train[:4] == ["train", "model", "--patch", "p"]
    assert following(powerinfer(*train))[:4] == ["split", "model", "--patch", "p"]
    place = ["--activations", "m.activations", "--predictors", "m.predictors", "--machine", "machine"]
    split = following(powerinfer("place", "model", "--patch", "p", *place, "-o", "m.placement"))
    assert split[:4] == ["split", "model", "--patch", "p"]
    result = powerinfer(*split, "--json")
    assert json.loads(result.out)["inputs"]["checkpoint"] == digest
    shown = json.loads(powerinfer("inspect", "m.gguf", "--json").out)["provenance"]["inputs"]
    assert shown["base"] == open_checkpoint(model).digest()


def following(result: Result) -> list[str]:
    """The arguments of the command that comes next."""
    assert result.code == 0, result.err
    line = next(line for line in result.err.splitlines() if line.startswith("next: powerinfer "))
    return shlex.split(line)[2:]


def test_build_takes_it(powerinfer: Program, model: Path) -> None:
    built = ["build", "model", "--corpus", "text.txt", "--tokens", "512", "--machine", "machine", "-o", "m.gguf"]
    assert powerinfer(*built, "--patch", "p").code == 0
    again = powerinfer(*built)
    assert (again.code, again.err.count("\n")) == (2, 1)
    assert "built with another checkpoint" in again.err


def test_the_patch_of_another_model_is_one_line(powerinfer: Program, model: Path, tmp_path: Path) -> None:
    make_llama(tmp_path / "other", n_embd=32, n_ff=64, activation="silu", seed=1)
    result = powerinfer("build", "other", "--patch", "p", "--corpus", "text.txt", "-o", "m.gguf")
    assert (result.code, result.out, result.err.count("\n")) == (1, "", 1)
    assert result.err.startswith("powerinfer: p: made from another checkpoint: expected ")
