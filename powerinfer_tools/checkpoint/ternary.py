"""Ternary weights as BitNet b1.58 publishes them (Ma et al. 2024, arXiv 2402.17764): -1, 0 or 1, times one scale."""

import numpy as np

from powerinfer_tools.checkpoint.source import FloatArray
from powerinfer_tools.checkpoint.sources import ReadRows, Rows, Source

BLOCK = 1 << 18  # elements held at once to find a scale
SMALLEST = 1e-5  # scale


def packed(name: str, shape: tuple[int, ...]) -> Source:
    """Row r lies in row r % n of `name`, U8 [n, in], n a quarter of our rows, rounded up: bits 2 (r // n) and the next
    are the number + 1. All are times `name`_scale [1].
    """
    n, scale = -(-shape[0] // 4), f"{name}_scale"

    def read(read: ReadRows, rows: Rows) -> FloatArray:
        shifts = (2 * (rows // n)).astype(np.uint8)[:, None]
        numbers = (read(name, rows % n).astype(np.uint8) >> shifts & 3).astype(np.float32)
        numbers -= 1
        numbers *= read(scale, np.zeros(1, np.int64))
        return numbers

    return Source(shape, {name: (n, shape[1]), scale: (1,)}, read)


def made_ternary(source: Source) -> Source:
    """The source's weights, rounded to -1, 0 or 1 times their mean magnitude, which is found at the first read."""
    found: list[np.float32] = []

    def read(read: ReadRows, rows: Rows) -> FloatArray:
        if not found:
            found.append(np.float32(max(_mean_magnitude(source, read), SMALLEST)))
        numbers = source.read(read, rows)
        numbers /= found[0]
        np.clip(np.rint(numbers, out=numbers), -1, 1, out=numbers)
        numbers *= found[0]
        return numbers

    return Source(source.shape, source.needs, read)


def _mean_magnitude(source: Source, read: ReadRows) -> float:
    n_out, n_in = source.shape
    step = max(1, BLOCK // n_in)
    blocks = (np.arange(start, min(start + step, n_out)) for start in range(0, n_out, step))
    total = sum(float(np.abs(source.read(read, rows)).sum(dtype=np.float64)) for rows in blocks)
    return total / (n_out * n_in)
