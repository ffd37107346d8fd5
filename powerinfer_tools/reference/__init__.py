"""The truth: what a model computes, in torch float32, one layer in memory at a time.

A neuron fires where its h is not 0. Tested against transformers; the native engine is tested against this.
"""

from powerinfer_tools.reference.ffn import Ffn, load_ffn
from powerinfer_tools.reference.layer import Layer, load_layer
from powerinfer_tools.reference.model import embed, forward, logits

__all__ = ["Ffn", "Layer", "embed", "forward", "load_ffn", "load_layer", "logits"]
