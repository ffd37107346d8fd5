"""Activations: which neurons of a model fire on a calibration corpus, and how often."""

from powerinfer_tools.activations.counted import counts_digest, take_counts
from powerinfer_tools.activations.file import Activations, apply, read_activations
from powerinfer_tools.activations.profiling import profile
from powerinfer_tools.activations.report import check_plot, plot, report

__all__ = [
    "Activations",
    "apply",
    "check_plot",
    "counts_digest",
    "plot",
    "profile",
    "read_activations",
    "report",
    "take_counts",
]
