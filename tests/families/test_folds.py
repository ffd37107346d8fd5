"""Whatever a family folds into its weights, a few rows cost a few rows: no matrix and no layer is held for them."""

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from powerinfer_tools.checkpoint import open_checkpoint
from tests.tiny_families import make_bamboo, make_bitnet, make_minicpm, make_nanochat

N_EMBD, N_FF = 128, 4096
MAKERS: dict[str, Any] = {
    "bamboo": make_bamboo,
    "bitnet": make_bitnet,
    "bitnet, master": lambda folder, **shape: make_bitnet(folder, weights="master", **shape),
    "bitnet, packed": lambda folder, **shape: make_bitnet(folder, weights="packed", **shape),
    "minicpm": make_minicpm,
    "nanochat": make_nanochat,
}


@pytest.mark.parametrize("family", MAKERS)
def test_rows_are_read_row_by_row(tmp_path: Path, family: str) -> None:
    shape = {"n_layer": 1, "n_embd": N_EMBD, "n_ff": N_FF, "n_vocab": 1024}
    checkpoint = open_checkpoint(MAKERS[family](tmp_path, **shape))
    for name in sorted(checkpoint.names()):
        whole = checkpoint.read(name)  # the master weights' scale is found here, at the first read
        rows = slice(len(whole) // 2 - 3, len(whole) // 2 + 2)
        tracemalloc.start()
        part = checkpoint.read(name, rows)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert part.dtype == np.float32
        np.testing.assert_array_equal(part, whole[rows])
        assert peak < 4 * part.nbytes + 2 * 4 * N_FF + 8192  # a norm of n_ff weights is read beside
