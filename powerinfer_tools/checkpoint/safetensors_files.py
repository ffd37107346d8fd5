"""The weights of a Hugging Face folder: one safetensors file, or several that an index names."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from powerinfer_tools.checkpoint.fields import read_json
from powerinfer_tools.checkpoint.source import FloatArray
from powerinfer_tools.errors import PowerinferError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
INDEX_LIMIT = 64 << 20
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
PACKED = {"U8": np.dtype("u1")}  # bytes that only a family understands


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies. offset: bytes from the start of the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def read(self, name: str, begin: int, end: int) -> FloatArray:
        """Rows [begin, end) (elements of a vector) as float32. dtype: of DTYPES or PACKED. Errors: the file is cut."""
        row = math.prod(self.shape[1:])
        count = (end - begin) * row
        dtype = (DTYPES | PACKED)[self.dtype]
        stored = np.fromfile(self.path, dtype, count, offset=self.offset + begin * row * dtype.itemsize)
        if stored.size != count:
            raise PowerinferError(f"{self.path}: {name}: expected {count} numbers, found {stored.size}", "truncated")
        if self.dtype == "BF16":  # the upper half of a float32
            stored = (stored.astype(np.uint32) << 16).view(np.float32)
        floats: FloatArray = stored.astype(np.float32, copy=False)
        return floats.reshape(end - begin, *self.shape[1:])


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, in order of name.

    Errors: only pickles, nothing, an index that leads out of the folder, a shard that is missing.
    """
    if (folder / INDEX).is_file():
        return [_shard(folder, name) for name in sorted(set(_weight_map(folder).values()))]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if pickles := sorted(path.name for pattern in PICKLES for path in folder.glob(pattern)):
        raise PowerinferError(
            f"{folder}: expected safetensors weights, found {pickles[0]}: a pickle can run code when it is read;"
            " convert it with the program that wrote it",
            "unsupported",
        )
    raise PowerinferError(f"{folder}: expected {SINGLE} or {INDEX}, found neither")


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of the folder by their own names. Errors: as weight_files; a damaged file; a missing tensor."""
    files = weight_files(folder)
    tensors = {path.name: _read_header(path) for path in files}
    if not (folder / INDEX).is_file():
        return tensors[SINGLE]
    found = {}
    for name, shard in _weight_map(folder).items():
        if name not in tensors[shard]:
            raise PowerinferError(f"{folder / shard}: expected {name}, as {INDEX} says, found none", "mismatch")
        found[name] = tensors[shard][name]
    return found


def _weight_map(folder: Path) -> dict[str, str]:
    weight_map = read_json(folder / INDEX, INDEX_LIMIT).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise PowerinferError(f"{folder / INDEX}: weight_map: expected names of files, found none", "malformed")
    return weight_map


def _shard(folder: Path, name: str) -> Path:
    if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
        raise PowerinferError(
            f"{folder / INDEX}: weight_map: expected a .safetensors file of this folder, found {name!r}", "malformed"
        )
    if not (folder / name).is_file():
        raise PowerinferError(f"{folder}: expected the shard {name}, as {INDEX} says, found none")
    return folder / name


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file; the safetensors library has checked every bound before we look."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise PowerinferError(f"{path}: expected safetensors, found {error}", "malformed") from error
    with path.open("rb") as file:
        n = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(n))
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(path, entry["dtype"], tuple(entry["shape"]), 8 + n + entry["data_offsets"][0])
        for name, entry in header.items()
    }
