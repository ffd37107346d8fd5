"""One transformer layer: it normalises first and adds the residual after."""

from dataclasses import dataclass

from torch import Tensor

from powerinfer_tools.checkpoint import Checkpoint
from powerinfer_tools.reference.attention import Attention, load_attention
from powerinfer_tools.reference.ffn import Ffn, load_ffn
from powerinfer_tools.reference.norm import Norm, load_norm
from powerinfer_tools.reference.router import Router, load_router


@dataclass
class Layer:
    """hidden: [b, n, n_embd], the residual stream; row p of n is position p.

    parallel: the FFN reads what attention reads, the stream before the layer; else the stream after attention.
    """

    attn_norm: Norm
    attn: Attention
    ffn_norm: Norm
    ffn: Ffn
    router: Router | None = None
    parallel: bool = False

    def attention(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The stream after attention, and the normalised x that the FFN, and any predictor, sees."""
        after = hidden + self.attn(self.attn_norm(hidden))
        return after, self.ffn_input(hidden, after)

    def ffn_input(self, before: Tensor, after: Tensor) -> Tensor:
        """That x, of the stream before and after attention."""
        return self.ffn_norm(before if self.parallel else after)

    def routes(self, before: Tensor, x: Tensor) -> Tensor | None:
        """The weights of the experts [.., n], of the stream before attention and that x; None without experts."""
        return None if self.router is None else self.router(before, x)

    def __call__(self, hidden: Tensor) -> Tensor:
        """The stream after the layer."""
        after, x = self.attention(hidden)
        return after + self.ffn(x, self.routes(hidden, x))


def load_layer(checkpoint: Checkpoint, i: int, device: str = "cpu") -> Layer:
    """Layer i, its weights as float32 on `device`."""
    return Layer(
        attn_norm=load_norm(checkpoint, f"blk.{i}.attn_norm", device),
        attn=load_attention(checkpoint, i, device),
        ffn_norm=load_norm(checkpoint, f"blk.{i}.ffn_norm", device),
        ffn=load_ffn(checkpoint, i, device),
        router=load_router(checkpoint, i, device),
        parallel=checkpoint.config.parallel,
    )
