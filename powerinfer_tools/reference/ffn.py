"""The feed-forward network and its neurons."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import hardshrink, linear, relu, silu

from powerinfer_tools.checkpoint import Checkpoint
from powerinfer_tools.reference.norm import unit_rms
from powerinfer_tools.reference.weights import optional, tensor


@dataclass
class Ffn:
    """gated: y = down . (a(gate . x) * up . x); plain: y = down . a(up . x).

    gate, up: [n_ff, n_embd], a row a neuron; down: [n_embd, n_ff], a column a neuron; None for what the model
    lacks: the gate of a plain FFN, biases; sub_eps: of the RMSNorm of all neurons before down, or None.
    """

    activation: str
    threshold: float
    gate: Tensor | None
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None
    sub_eps: float | None = None

    def select(self, x: Tensor) -> Tensor:
        """Pre-activations [.., n_ff] of the rows that decide who fires; x: normalised, [.., n_embd]."""
        if self.gate is None:
            return linear(x, self.up, self.up_bias)
        return linear(x, self.gate, self.gate_bias)

    def neurons(self, x: Tensor, routes: Tensor | None = None) -> Tensor:
        """h [.., n_ff], exactly 0 where a neuron does not fire; routes: the weights of the experts, [.., n]."""
        a = activate(self.select(x), self.activation, self.threshold)
        if routes is not None:
            a = a * self.each(routes)
        if self.gate is None:
            return a
        up = linear(x, self.up, self.up_bias)
        return a * (relu(up) if self.activation == "drelu" else up)

    def each(self, routes: Tensor) -> Tensor:
        """What the experts have, [.., n], for each neuron, [.., n_ff]."""
        return routes.repeat_interleave(len(self.up) // routes.shape[-1], dim=-1)

    def output(self, neurons: Tensor) -> Tensor:
        """What the neurons' h add to the stream: [.., n_ff] -> [.., n_embd]."""
        h = neurons if self.sub_eps is None else unit_rms(neurons, self.sub_eps)
        return linear(h, self.down, self.down_bias)

    def __call__(self, x: Tensor, routes: Tensor | None = None) -> Tensor:
        return self.output(self.neurons(x, routes))


def activate(g: Tensor, activation: str, threshold: float = 0.0) -> Tensor:
    """a(g). fatrelu (ProSparse, Song et al. 2024): g where g > threshold, else 0.

    Any other is cut where a threshold is set (CATS, Lee et al. 2024): 0 where |a(g)| < threshold.
    """
    if activation == "fatrelu":
        return torch.where(g > threshold, g, 0.0)
    a = silu(g) if activation == "silu" else relu(g)
    if activation == "relu2":
        a = a.square()
    return hardshrink(a, _below(threshold)) if threshold > 0 else a


def _below(threshold: float) -> float:
    """The next smaller float32: hardshrink keeps what is above, a cut what is not below."""
    return float(torch.nextafter(torch.tensor(threshold), torch.tensor(0.0)))


def load_ffn(checkpoint: Checkpoint, i: int, device: str = "cpu") -> Ffn:
    """Layer i's FFN, with the threshold that checkpoint.config gives it."""
    config, b = checkpoint.config, f"blk.{i}"
    return Ffn(
        activation=config.activation,
        threshold=config.thresholds[i],
        gate=tensor(checkpoint, f"{b}.ffn_gate.weight", device) if config.gated else None,
        up=tensor(checkpoint, f"{b}.ffn_up.weight", device),
        down=tensor(checkpoint, f"{b}.ffn_down.weight", device),
        gate_bias=optional(checkpoint, f"{b}.ffn_gate.bias", device),
        up_bias=optional(checkpoint, f"{b}.ffn_up.bias", device),
        down_bias=optional(checkpoint, f"{b}.ffn_down.bias", device),
        sub_eps=config.norm_eps if config.sub_norms else None,
    )
