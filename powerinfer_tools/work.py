"""Unfinished work beside an output: a folder of whole pieces, so that a killed run goes on where it stopped."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.files import atomic_write, canonical_json, check_writable, locked


@contextmanager
def resumable(output: Path, fingerprint: Mapping[str, Any], force: bool) -> Iterator[Path]:
    """Yields the folder for the pieces of `output`, which is locked meanwhile; the folder goes when the block succeeds.

    Pieces of an earlier run are kept where its fingerprint (a JSON object) is this one's. Errors: another run's pieces
    are there and not `force`; another process is at work; `output` exists and not `force`.
    """
    check_writable(output, force)
    with locked(output):
        folder = output.with_name(f".{output.name}.work")
        _claim(folder, json.loads(canonical_json(fingerprint)), output, force)
        yield folder
        shutil.rmtree(folder)


def _claim(folder: Path, fingerprint: dict[str, Any], output: Path, force: bool) -> None:
    mark = folder / "fingerprint.json"
    found = json.loads(mark.read_text()) if mark.is_file() else None
    if found == fingerprint:
        return
    if found is not None and not force:
        differing = sorted(key for key in found.keys() | fingerprint.keys() if found.get(key) != fingerprint.get(key))
        raise PowerinferError(
            f"{output}: an unfinished run with another {', '.join(differing)} lies in {folder}: "
            "repeat that run to finish it, or use --force to begin anew",
            "exists",
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with atomic_write(mark) as file:
        file.write(canonical_json(fingerprint).encode())
