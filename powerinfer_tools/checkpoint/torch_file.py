"""Files of torch.save that others made: tensors and plain containers, never code."""

from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
import numpy.typing as npt

from powerinfer_tools.errors import PowerinferError

OVERHEAD = 1 << 16  # bytes of a file beside its tensors


def read_torch(path: Path, n_bytes: int) -> Any:
    """What torch.save wrote to `path`: tensors of at most n_bytes. Errors: missing, larger, damaged, code in it."""
    import torch

    if not path.is_file():
        raise PowerinferError(f"{path}: expected this file, found none", "mismatch")
    if (found := _unpacked(path)) > n_bytes + OVERHEAD:
        raise PowerinferError(f"{path}: expected at most {n_bytes} bytes of tensors, found {found}", "mismatch")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises whatever its first wrong byte leads to
        message = f"{path}: expected tensors as torch.save writes them and no code, found {type(error).__name__}"
        raise PowerinferError(message, "malformed") from error


def array_of(path: Path, name: str, value: Any, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """A tensor of `shape` that `path` holds, as an array. Errors: no tensor, of another shape, no finite numbers."""
    import torch

    found = tuple(value.shape) if torch.is_tensor(value) else None
    plain = found is not None and value.layout == torch.strided and value.device.type == "cpu"
    if found != shape or not plain or value.is_quantized or value.dtype.is_complex:
        shown = "none" if found is None else list(found) if found != shape else "others"
        raise PowerinferError(f"{path}: {name}: expected numbers of shape {list(shape)}, found {shown}", "mismatch")
    array: npt.NDArray[Any] = value.detach().double().numpy()
    if not np.isfinite(array).all():
        raise PowerinferError(f"{path}: {name}: expected finite numbers, found others", "malformed")
    return array


def _unpacked(path: Path) -> int:
    """Bytes that the file takes in memory: torch packs its records into a zip archive."""
    try:
        with ZipFile(path) as archive:
            return sum(record.file_size for record in archive.infolist())
    except BadZipFile:  # torch's older format is no archive
        return path.stat().st_size
    except Exception as error:  # what its first wrong byte leads to
        raise PowerinferError(f"{path}: expected an archive, found {type(error).__name__}", "malformed") from error
