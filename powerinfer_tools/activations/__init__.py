"""Activations: which neurons of a model fire on a calibration corpus, and how often."""

from powerinfer_tools.activations.file import Activations, apply, read_activations
from powerinfer_tools.activations.profiling import profile
from powerinfer_tools.activations.report import check_plot, plot, report

__all__ = ["Activations", "apply", "check_plot", "plot", "profile", "read_activations", "report"]
