"""What is known is said in one place: in refusals, and in README's table."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import CONFIG_MAPPING

from powerinfer_tools.checkpoint import open_checkpoint
from powerinfer_tools.checkpoint.config import ACTIVATIONS
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.families import table
from powerinfer_tools.families.registry import all_families, by_architecture, by_model_type
from tests.checkpoint.test_huggingface import edit
from tests.tiny import make_llama
from tests.tiny_families import make_bitnet, make_nanochat
from tests.tiny_gguf import make_gguf
from tests.tiny_moe import make_mixtral, make_smallthinker

README = Path(__file__).parent.parent.parent / "README.md"


def test_every_family_is_found_and_says_what_it_is() -> None:
    names = [family.name for family in all_families()]
    assert {"llama", "opt", "falcon", "nemotron", "arcee"} <= set(names)
    assert len(set(names)) == len(names)
    assert sum(len(family.models) for family in all_families()) == len(by_model_type())
    assert sum(len(family.gguf) for family in all_families()) == len(by_architecture())
    for family in all_families():
        assert set(family.activations) <= set(ACTIVATIONS)


def test_importing_the_registry_reads_no_family() -> None:
    code = "import sys, powerinfer_tools.families.registry; sys.exit('powerinfer_tools.families.opt' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("make", "theta"),
    [(make_llama, None), (make_mixtral, None), (make_bitnet, None), (make_nanochat, None), (make_smallthinker, 1e6)],
)
def test_rotation_where_no_field_says(make: Callable[..., Path], theta: float | None, tmp_path: Path) -> None:
    """theta: as published; None: as transformers has it."""
    folder = make(tmp_path / "model")
    edit(folder / "config.json", rope_theta=None, rope_parameters=None)
    config = open_checkpoint(folder).config
    theta = theta or CONFIG_MAPPING[config.arch]().rope_parameters["rope_theta"]
    assert config.rope is not None
    n = len(config.rope.inv_freq)
    np.testing.assert_allclose(np.abs(config.rope.inv_freq), theta ** -(np.arange(n) / n), rtol=1e-6)


def test_readme_has_the_table() -> None:
    """After a change: make families."""
    page = README.read_text()
    assert table.with_table(page) == page
    assert table.with_table(page.replace("| falcon |", "| hawk |")) == page


def test_an_unknown_model_type_is_told_which_are_known(tmp_path: Path) -> None:
    folder = make_llama(tmp_path)
    edit(folder / "config.json", model_type="mamba", architectures=["MambaForCausalLM"])
    with pytest.raises(PowerinferError) as caught:
        open_checkpoint(folder)
    known = ", ".join(by_model_type())
    assert str(caught.value) == f"{folder / 'config.json'}: model_type: expected one of {known}, found 'mamba'"
    assert caught.value.kind == "unsupported"


def test_an_unknown_architecture_is_told_which_are_known(tmp_path: Path) -> None:
    path = make_gguf(tmp_path / "m.gguf", make_llama(tmp_path / "hf"), arch="mamba")
    with pytest.raises(PowerinferError) as caught:
        open_checkpoint(path)
    known = ", ".join(by_architecture())
    assert str(caught.value) == f"{path}: general.architecture: expected one of {known}, found 'mamba'"
    assert caught.value.kind == "unsupported"
