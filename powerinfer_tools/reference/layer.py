"""One transformer layer: both families normalise first and add the residual after."""

from dataclasses import dataclass

from torch import Tensor

from powerinfer_tools.checkpoint import Checkpoint
from powerinfer_tools.reference.attention import Attention, load_attention
from powerinfer_tools.reference.ffn import Ffn, load_ffn
from powerinfer_tools.reference.norm import Norm, load_norm


@dataclass
class Layer:
    """hidden: [b, n, n_embd], the residual stream; row p of n is position p."""

    attn_norm: Norm
    attn: Attention
    ffn_norm: Norm
    ffn: Ffn

    def attention(self, hidden: Tensor) -> Tensor:
        """The stream after attention."""
        return hidden + self.attn(self.attn_norm(hidden))

    def ffn_input(self, hidden: Tensor) -> Tensor:
        """The normalised x that the FFN, and any predictor, sees."""
        return self.ffn_norm(hidden)

    def add_ffn(self, hidden: Tensor) -> Tensor:
        """The stream after the FFN."""
        return hidden + self.ffn(self.ffn_input(hidden))


def load_layer(checkpoint: Checkpoint, i: int, device: str = "cpu") -> Layer:
    """Layer i, its weights as float32 on `device`."""
    return Layer(
        attn_norm=load_norm(checkpoint, f"blk.{i}.attn_norm", device),
        attn=load_attention(checkpoint, i, device),
        ffn_norm=load_norm(checkpoint, f"blk.{i}.ffn_norm", device),
        ffn=load_ffn(checkpoint, i, device),
    )
