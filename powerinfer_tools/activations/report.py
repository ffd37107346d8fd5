"""What the literature plots of a profile: active shares, and how few neurons make most activations."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from powerinfer_tools.activations.file import Activations
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.files import atomic_write

MOST = 0.8  # PowerInfer (arXiv 2312.12456), section 3.1: the neurons that make 80 % of all activations


def share_making(counts: npt.NDArray[np.int64], share: float = MOST) -> float:
    """The smallest share of neurons that makes `share` of all activations; 0 where nothing fires."""
    if counts.sum() == 0:
        return 0.0
    cumulative = np.cumsum(np.sort(counts)[::-1])
    return float(np.searchsorted(cumulative, share * cumulative[-1]) + 1) / len(counts)


def report(activations: Activations) -> dict[str, Any]:
    """Active share and share of neurons that makes 80 % of activations, per layer and over the whole model."""
    counts = [activations.counts(i) for i in range(activations.n_layer)]
    layers = [
        {
            "layer": i,
            "active_share": float(c.sum()) / (activations.n_tokens * activations.n_ff),
            "neurons_making_80": share_making(c),
            "threshold": activations.thresholds[i],
        }
        for i, c in enumerate(counts)
    ]
    return {
        "path": str(activations.path),
        "tokens": activations.n_tokens,
        "samples": activations.n_samples,
        "active_share": float(np.mean([layer["active_share"] for layer in layers])),
        "neurons_making_80": share_making(np.concatenate(counts)),
        "layers": layers,
    }


def check_plot() -> None:
    """Error: matplotlib, which `plot` needs, is not installed."""
    if find_spec("matplotlib") is None:
        message = "--plot needs matplotlib, which is not installed: pip install 'powerinfer[plots]'"
        raise PowerinferError(message, "unsupported")


def plot(activations: Activations, path: Path, force: bool = False) -> None:
    """Draws the cumulative share of activations against the share of neurons, one curve a layer, as a PNG.

    After PowerInfer (arXiv 2312.12456), figure 4. Error: matplotlib is not installed.
    """
    check_plot()
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    counts = [activations.counts(i) for i in range(activations.n_layer)]
    for i, c in enumerate(counts):
        colour = colormaps["viridis"](i / max(1, activations.n_layer - 1))
        axes.plot(*_curve(c), color=colour, linewidth=0.8)
    axes.plot(*_curve(np.concatenate(counts)), color="black", linewidth=2, label="whole model")
    axes.axhline(MOST, color="grey", linestyle=":")
    axes.set(xlabel="share of neurons, most active first", ylabel="share of activations", xlim=(0, 1), ylim=(0, 1.01))
    axes.set_title(f"layers 0 (dark) to {activations.n_layer - 1} (light)", fontsize=9)
    axes.legend(loc="lower right")
    with atomic_write(path, force) as file:
        figure.savefig(file, format="png", dpi=150)


def _curve(counts: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    cumulative = np.cumsum(np.sort(counts)[::-1]) / max(1, counts.sum())
    kept = np.unique(np.linspace(0, len(counts) - 1, 512).astype(int))  # enough points for any screen
    return (kept + 1) / len(counts), cumulative[kept]
