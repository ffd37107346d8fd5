"""ProSparse's folders are LLaMA's under another name."""

import json
from dataclasses import replace
from pathlib import Path

from powerinfer_tools.checkpoint import open_checkpoint
from tests.tiny import make_llama


def test_a_prosparse_folder_is_a_llama_with_fatrelu(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "model", activation="fatrelu")
    expected = open_checkpoint(folder)
    config = folder / "config.json"
    theirs = {"model_type": "sparsellama", "architectures": ["SparseLlamaForCausalLM"]}
    config.write_text(json.dumps(json.loads(config.read_text()) | theirs))
    found = open_checkpoint(folder)
    assert replace(found.config, rope=None) == replace(expected.config, rope=None)
    assert found.names() == expected.names()
    assert found.config.activation == "fatrelu"
