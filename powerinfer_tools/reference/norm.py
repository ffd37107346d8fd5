"""The normalisations."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import layer_norm

from powerinfer_tools.checkpoint import Checkpoint
from powerinfer_tools.reference.weights import optional, tensor


@dataclass
class Norm:
    """rms: RMSNorm (Zhang and Sennrich 2019, eq. 4); layer: LayerNorm (Ba et al. 2016). Sizes: [n_embd]."""

    kind: str
    weight: Tensor
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        if self.kind == "layer":
            return layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        return unit_rms(x, self.eps) * self.weight


def unit_rms(x: Tensor, eps: float) -> Tensor:
    """RMSNorm without weights, over the last dimension."""
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def load_norm(checkpoint: Checkpoint, name: str, device: str = "cpu") -> Norm:
    """The norm called `name`, such as "blk.0.attn_norm"."""
    config = checkpoint.config
    weight = tensor(checkpoint, f"{name}.weight", device)
    return Norm(config.norm, weight, optional(checkpoint, f"{name}.bias", device), config.norm_eps)
