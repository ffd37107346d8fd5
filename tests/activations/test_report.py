"""Shares of a profile, and its picture."""

import numpy as np
import pytest

from powerinfer_tools.activations import plot, profile, report
from powerinfer_tools.activations.report import share_making
from powerinfer_tools.checkpoint import open_checkpoint
from powerinfer_tools.progress import silent
from tests import planted


@pytest.mark.parametrize(
    ("counts", "share"), [([10, 10, 10, 10, 10], 0.8), ([80, 5, 5, 5, 5], 0.2), ([0, 79, 1, 20], 0.5), ([0, 0], 0.0)]
)
def test_share_of_neurons_that_makes_80_percent(counts, share):
    assert share_making(np.array(counts)) == pytest.approx(share)


def test_report_and_plot_of_planted_patterns(tmp_path):
    folder, pattern = planted.make_patterned(tmp_path / "model", n_layer=3)
    text = planted.write_text(tmp_path / "text")
    activations = profile(open_checkpoint(folder), [text], tmp_path / "a", n_tokens=256, window=64, progress=silent)
    found = report(activations)
    for i, layer in enumerate(found["layers"]):
        assert layer["active_share"] == pytest.approx(pattern[i].mean())
        assert layer["neurons_making_80"] == pytest.approx(np.ceil(0.8 * pattern[i].sum()) / pattern.shape[1])
    assert found["neurons_making_80"] == pytest.approx(np.ceil(0.8 * pattern.sum()) / pattern.size)
    plot(activations, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
