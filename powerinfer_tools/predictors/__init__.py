"""Predictors: small networks that foresee which neurons fire, where that saves bytes."""

from powerinfer_tools.predictors.file import Predictors, read_predictors
from powerinfer_tools.predictors.pretrained import Pretrained, open_pretrained, take_predictors
from powerinfer_tools.predictors.training import train

__all__ = ["Predictors", "Pretrained", "open_pretrained", "read_predictors", "take_predictors", "train"]
