"""Small models, firing patterns and machines for placement, drawn from a few numbers."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from powerinfer_tools.artifact.layout import MODE_GATE, MODE_PREDICTOR, LayerPlan
from powerinfer_tools.checkpoint.config import Config
from powerinfer_tools.placement import Machine, Tier, artifact_costs
from powerinfer_tools.placement.problem import Problem

BIASES: frozenset[str] = frozenset()


def config(n_layer: int = 4, n_ff: int = 96, n_embd: int = 64, gated: bool = True, tied: bool = False) -> Config:
    return Config(
        arch="llama",
        name="test",
        n_layer=n_layer,
        n_embd=n_embd,
        n_ff=n_ff,
        n_head=4,
        n_head_kv=2,
        head_dim=16,
        n_vocab=64,
        n_ctx=128,
        norm_eps=1e-5,
        activation="relu",
        gated=gated,
        tied=tied,
        rope=None,
        thresholds=(0.0,) * n_layer,
    )


@dataclass(frozen=True)
class Firing:
    """Firing frequencies as activations offer them: frequency [n_layer, n_ff]."""

    frequencies: npt.NDArray[np.float64]
    digest: str = "0" * 64

    @property
    def n_layer(self) -> int:
        return int(self.frequencies.shape[0])

    @property
    def n_ff(self) -> int:
        return int(self.frequencies.shape[1])

    def frequency(self, i: int, /) -> npt.NDArray[np.float64]:
        return self.frequencies[i]


def firing(n_layer: int, n_ff: int, seed: int) -> Firing:
    """Skewed frequencies, another mean and skew in each layer."""
    draw = np.random.default_rng(seed)
    skew = draw.uniform(0.3, 2.0, (n_layer, 1))
    return Firing(np.clip(draw.lognormal(draw.uniform(-4, -1, (n_layer, 1)), skew, (n_layer, n_ff)), 0, 1))


def machine(merge_s: float = 2e-7, disk_latency_s: float = 1e-6, has_disk: bool = True) -> Machine:
    """A card ten times as fast as RAM, a disk ten times slower; tiny models take microseconds on it."""
    return Machine(
        name="test",
        threads=2,
        ram=Tier(1 << 40, 30e9, ((64, 10e9), (4096, 24e9))),
        vram=Tier(1 << 40, 300e9, ((64, 100e9), (4096, 250e9)), merge_s / 2, merge_s / 100, 25e9),
        disk=Tier(1 << 40, 3e9, ((64, 0.1e9), (4096, 1e9)), disk_latency_s) if has_disk else None,
    )


def plans(n_layer: int, mode: str = "gate") -> list[LayerPlan]:
    """Layers in mode gate or predictor, or one after the other."""
    gate, predictor = LayerPlan(MODE_GATE), LayerPlan(MODE_PREDICTOR, rank=32, always=5)
    return {"gate": [gate] * n_layer, "predictor": [predictor] * n_layer, "mixed": [gate, predictor] * n_layer}[mode][
        :n_layer
    ]


def problem(n_layer: int = 4, n_ff: int = 96, seed: int = 0, mode: str = "gate", **machine_args: Any) -> Problem:
    here = machine(**machine_args)
    costs = artifact_costs(
        config(n_layer, n_ff), plans(n_layer, mode), quant="q8_0", biases=BIASES, ctx_size=64, threads=here.threads
    )
    return Problem(costs, firing(n_layer, n_ff, seed), here)
