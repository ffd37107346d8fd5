"""Sparsify: a dense gated model to an exactly sparse one, distilled from itself."""

from powerinfer_tools.sparsify.patch import Merged, merge
from powerinfer_tools.sparsify.recipe import Recipe
from powerinfer_tools.sparsify.run import Result, sparsify
from powerinfer_tools.sparsify.training import Step
from powerinfer_tools.sparsify.write import write_folder

__all__ = ["Merged", "Recipe", "Result", "Step", "merge", "sparsify", "write_folder"]
