"""What a model is: the sizes and choices that every stage shares."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

ACTIVATIONS = ("relu", "relu2", "fatrelu", "drelu", "silu")
"""a(gate) of the FFN. relu2: relu squared; fatrelu: g where g > t, else 0; drelu: relu on gate and up;
silu with t > 0: silu(g) where |silu(g)| >= t, else 0 (the cut activation)."""

NORMS = ("rms", "layer")
GATINGS = ("softmax", "sigmoid")
ROUTER_INPUTS = ("ffn_input", "layer_input")
MAX_EXPERTS = 512  # as in native/src/model.h


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding, half-split ("neox") layout.

    inv_freq: float32 [rotary_dim / 2], scaling already applied; scale multiplies cos and sin (YaRN).
    """

    inv_freq: npt.NDArray[np.float32]
    scale: float = 1.0


@dataclass(frozen=True)
class Experts:
    """Of a layer's neurons, only those of the chosen experts take part: each of n experts has n_ff / n of them.

    gating: softmax over the chosen experts' logits, or their sigmoids, made to sum to 1; routed_by: what the router
    sees, the normalised FFN input or the stream before attention.
    """

    n: int
    n_used: int
    gating: str
    routed_by: str


@dataclass(frozen=True)
class Config:
    """What a model computes; `arch` names its family and decides nothing. Sizes in elements.

    thresholds: one activation threshold a layer (0 where there is none); norm: RMSNorm or LayerNorm with bias;
    learned_positions: a row for each is added to the embedding; parallel: the FFN reads the layer's input, as attention
    does; qk_norm: queries and keys of each head are RMS-normalised after rotation, without weights; sub_norms: so are
    attention's heads before the output matrix and the FFN's neurons before down; softcap: logits become
    softcap * tanh(logits / softcap), 0: they stay; rotary: which layers rotate, () for all where there is a rope.
    """

    arch: str
    name: str
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_vocab: int
    n_ctx: int
    norm_eps: float
    activation: str
    gated: bool
    tied: bool
    rope: Rope | None
    thresholds: tuple[float, ...]
    norm: str = "rms"
    learned_positions: bool = False
    parallel: bool = False
    qk_norm: bool = False
    sub_norms: bool = False
    softcap: float = 0.0
    rotary: tuple[bool, ...] = ()
    experts: Experts | None = None

    def with_thresholds(self, thresholds: tuple[float, ...]) -> "Config":
        """The same model with its activation cut at one threshold a layer."""
        return replace(self, thresholds=thresholds)

    def sparsified(self, activation: str, thresholds: tuple[float, ...]) -> "Config":
        """The same sizes with another activation and its thresholds."""
        return replace(self, activation=activation, thresholds=thresholds)

    def rope_of(self, i: int) -> Rope | None:
        """How layer i rotates, or None where it does not."""
        return self.rope if not self.rotary or self.rotary[i] else None

    @property
    def n_rows(self) -> int:
        """Rows of one neuron: gate, up and down, or up and down."""
        return 3 if self.gated else 2

    @property
    def taking_part(self) -> float:
        """Of the neurons, the share that a token's experts have."""
        return 1.0 if self.experts is None else self.experts.n_used / self.experts.n

    @property
    def exactly_sparse(self) -> bool:
        """True where the activation gives exact zeros."""
        return self.activation != "silu" or any(t > 0 for t in self.thresholds)
