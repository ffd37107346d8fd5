"""The processes that train together: one, or as many as torchrun started on one machine or several."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

PATIENCE = timedelta(hours=2)  # the first process reads, fits and writes while the others wait


@dataclass(frozen=True)
class Team:
    """rank: this process's number; only the lead, number 0, writes files."""

    rank: int
    size: int
    device: str

    @property
    def lead(self) -> bool:
        return self.rank == 0

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Each tensor becomes its sum over all processes."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def spread(self, tensors: Iterable[Tensor]) -> None:
        """Each tensor becomes the lead's."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def tell(self, value: Any) -> Any:
        """The lead's value, on every process."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, 0)
        return values[0]

    def collect(self, value: Any) -> list[Any]:
        """The values of all processes in their order, on every process."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values


@contextmanager
def joined() -> Iterator[Team]:
    """Yields the team that this process is in, by torchrun's environment."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if size == 1:
        yield Team(0, 1, device)
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield Team(dist.get_rank(), size, device)
    finally:
        dist.destroy_process_group()
