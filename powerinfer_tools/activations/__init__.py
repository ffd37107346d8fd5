"""Activations: which neurons of a model fire on a calibration corpus, and how often."""

from powerinfer_tools.activations.file import Activations, apply, read_activations
from powerinfer_tools.activations.profiling import profile
from powerinfer_tools.activations.report import plot, report

__all__ = ["Activations", "apply", "plot", "profile", "read_activations", "report"]
