"""The native engine from Python: token ids in, token ids out. Imports neither torch nor gguf."""

from powerinfer_tools.engine.engine import CardLimits, DiskLimits, Engine, LayerScore, Model, ModelInfo, Sampling, Stats
from powerinfer_tools.engine.generate import Token, generate

__all__ = [
    "CardLimits",
    "DiskLimits",
    "Engine",
    "LayerScore",
    "Model",
    "ModelInfo",
    "Sampling",
    "Stats",
    "Token",
    "generate",
]
