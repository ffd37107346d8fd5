"""A random dense model, a text of many documents, and a short recipe."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from powerinfer_tools.checkpoint import Checkpoint, open_checkpoint
from powerinfer_tools.progress import silent
from powerinfer_tools.sparsify import Recipe, Result, Step, sparsify
from tests.tiny import CORPUS, make_llama

SHORT = Recipe(active=0.3, n_tokens=24 * 256, step_tokens=256, window=32, rate=3e-3, precision="float32")


@dataclass
class Bench:
    """A folder with a model and a text, and the steps of the last run."""

    folder: Path
    model: Path
    text: Path
    steps: list[Step] = field(default_factory=list)

    @property
    def checkpoint(self) -> Checkpoint:
        return open_checkpoint(self.model)

    def sparsify(self, name: str = "out", report: Callable[[Step], None] | None = None, **changes: Any) -> Result:
        """A run of SHORT with these changes; those that are no part of a recipe go to sparsify()."""
        self.steps.clear()
        options = {key: changes.pop(key) for key in ("force", "save_s") if key in changes}
        result = sparsify(
            self.checkpoint,
            [self.text],
            self.folder / name,
            replace(SHORT, **changes),
            progress=silent,
            report=report or self.steps.append,
            **options,
        )
        assert result is not None
        return result


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The model's folder and the text."""
    folder = tmp_path_factory.mktemp("dense")
    rng = random.Random(0)
    words = CORPUS.split()
    text = folder / "text.txt"
    text.write_text("\n\n\n".join(" ".join(rng.choices(words, k=40)) for _ in range(40)))
    return make_llama(folder / "model", n_embd=32, n_ff=96, n_head=2, n_head_kv=1, activation="silu", n_ctx=128), text


@pytest.fixture
def bench(shared: tuple[Path, Path], tmp_path: Path) -> Bench:
    return Bench(tmp_path, *shared)


@pytest.fixture
def tokens() -> torch.Tensor:
    """Four windows, [4, 32]."""
    return torch.randint(300, (4, 32), generator=torch.Generator().manual_seed(3))
