"""Which experts a token's neurons are taken from, and with what weight."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from powerinfer_tools.checkpoint import Checkpoint, Experts
from powerinfer_tools.reference.weights import tensor


@dataclass
class Router:
    """softmax: Mixtral (Jiang et al. 2024, section 2.1); sigmoid: SmallThinker (Song et al. 2025, section 2).

    weight: [experts.n, n_embd].
    """

    experts: Experts
    weight: Tensor

    def __call__(self, before: Tensor, x: Tensor) -> Tensor:
        """The experts' weights [.., experts.n], 0 for those not chosen; of equal ones the first are.

        before: the stream before attention, x: the normalised FFN input, both [.., n_embd].
        """
        logits = linear(before if self.experts.routed_by == "layer_input" else x, self.weight)
        chosen = logits.sort(dim=-1, descending=True, stable=True).indices[..., : self.experts.n_used]
        weights = logits.gather(-1, chosen)
        if self.experts.gating == "softmax":
            weights = weights.softmax(-1)
        else:
            weights = weights.sigmoid()
            weights = weights / weights.sum(-1, keepdim=True)
        return torch.zeros_like(logits).scatter(-1, chosen, weights)


def load_router(checkpoint: Checkpoint, i: int, device: str = "cpu") -> Router | None:
    """Layer i's router, or None where there are no experts."""
    experts = checkpoint.config.experts
    return None if experts is None else Router(experts, tensor(checkpoint, f"blk.{i}.ffn_router.weight", device))
