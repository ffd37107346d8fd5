"""Sparsify: a dense gated model to an exactly sparse one, distilled from itself."""

from powerinfer_tools.sparsify.recipe import Recipe
from powerinfer_tools.sparsify.run import Result, sparsify
from powerinfer_tools.sparsify.training import Step
from powerinfer_tools.sparsify.write import write_folder

__all__ = ["Recipe", "Result", "Step", "sparsify", "write_folder"]
