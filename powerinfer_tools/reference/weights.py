"""From a checkpoint's arrays to torch."""

import torch
from torch import Tensor

from powerinfer_tools.checkpoint import Checkpoint, check_finite


def tensor(checkpoint: Checkpoint, name: str, device: str = "cpu", rows: slice | None = None) -> Tensor:
    """The named tensor, or some of its rows, as float32 on `device`. Errors: weights that are not finite."""
    array = checkpoint.read(name, rows)
    check_finite(f"{checkpoint.path}: {name}", array, rows.start if rows is not None else 0)
    return torch.from_numpy(array).to(device)


def optional(checkpoint: Checkpoint, name: str, device: str = "cpu") -> Tensor | None:
    """The named tensor, or None where the model has none."""
    return tensor(checkpoint, name, device) if name in checkpoint.names() else None
