"""The frequencies of rotary position embeddings, with the scaling variants that extend a model's context.

All frequencies are float64 [head_dim / 2] in radians a position; `finish` rounds them once.
"""

import math

import numpy as np
import numpy.typing as npt

from powerinfer_tools.checkpoint.config import Rope
from powerinfer_tools.checkpoint.fields import Fields

Frequencies = npt.NDArray[np.float64]

SCALINGS = ("default", "linear", "dynamic", "llama3", "yarn")


def frequencies(theta: float, head_dim: int) -> Frequencies:
    """theta^(-2i / head_dim), i < head_dim / 2 (Su et al. 2021, section 3.2.2)."""
    return np.asarray(theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim))


def llama3(freq: Frequencies, factor: float, low: float, high: float, n_original: int) -> Frequencies:
    """Llama 3.1's scaling: frequencies of fewer than `low` turns within the original context are divided by `factor`,
    those of more than `high` are kept, those between are blended.
    """
    turns = n_original * freq / (2 * math.pi)  # rotations within the original context
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return np.asarray(keep * freq + (1 - keep) * freq / factor)


def yarn(
    freq: Frequencies,
    theta: float,
    factor: float,
    n_original: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> Frequencies:
    """YaRN (Peng et al. 2023, section 3.2): frequencies of more than beta_fast turns within the original context are
    kept, those of fewer than beta_slow are divided by `factor`, those between are blended.
    """
    head_dim = 2 * len(freq)

    def dimension(turns: float) -> float:
        return head_dim * math.log(n_original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = dimension(beta_fast), dimension(beta_slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    span = last - first or 0.001  # a step where the two meet
    keep = 1 - np.clip((np.arange(len(freq)) - first) / span, 0.0, 1.0)
    return np.asarray(keep * freq + (1 - keep) * freq / factor)


def yarn_scale(factor: float, mscale: float = 1.0) -> float:
    """What cos and sin are multiplied by (Peng et al. 2023, eq. 15)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def plain_theta(rope: Rope, head_dim: int) -> float | None:
    """The base of plain rotary frequencies of whole heads, found in them; None where they are scaled or partial."""
    n = head_dim
    theta = float(f"{float(rope.inv_freq[-1]) ** (-n / (n - 2)):.6g}") if n > 2 else 10000.0
    plain = np.array_equal(frequencies(theta, n).astype(np.float32), rope.inv_freq)
    return theta if plain and rope.scale == 1 else None


def finish(freq: Frequencies, scale: float = 1.0) -> Rope:
    """The Rope that engines use."""
    return Rope(freq.astype(np.float32), scale)


def rope_from_config(
    fields: Fields, head_dim: int, n_ctx: int, partial: float | None = None, theta: float = 10000.0
) -> Rope:
    """The rope of a config.json: rope_parameters, or rope_scaling and rope_theta.

    partial: the share of a head that rotates where no field says; None: no other share than all is expected; theta:
    what it is where no field says.
    Errors: a variant that this program does not compute, or one that lacks its numbers.
    """
    key = "rope_parameters" if "rope_parameters" in fields else "rope_scaling"
    values = fields.values.get(key) or {}
    if not isinstance(values, dict):
        raise fields.error(key, "an object", values)
    scaling = Fields(f"{fields.where}: {key}", values)
    theta = scaling.number("rope_theta", fields.number("rope_theta", theta), low=1.0)
    rotary_dim = _rotary_dim(fields, scaling, head_dim, partial)
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    if kind not in SCALINGS:
        raise scaling.error("rope_type", f"one of {', '.join(SCALINGS)}", kind, "unsupported")
    freq = frequencies(theta, rotary_dim)
    if kind in (
        "default",
        "dynamic",
    ):  # dynamic scaling begins beyond max_position_embeddings, where n_ctx ends
        return finish(freq)
    factor = scaling.number("factor", low=0.0)
    if kind == "linear":  # positions divided by factor (Chen et al. 2023)
        return finish(freq / factor)
    n_original = _original_context(fields, scaling, n_ctx)
    if kind == "llama3":
        low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
        if low >= high:
            raise scaling.error("low_freq_factor", f"less than high_freq_factor {high:g}", low)
        return finish(llama3(freq, factor, low, high, n_original))
    return _yarn_from_config(scaling, freq, theta, factor, n_original)


def _rotary_dim(fields: Fields, scaling: Fields, head_dim: int, partial: float | None) -> int:
    """The first dimensions of a head, those that rotate."""
    key = "partial_rotary_factor"
    place = scaling if key in scaling else fields
    share = place.number(key, partial or 1.0, high=1.0)
    if partial is None and share != 1.0:
        raise place.unsupported(key, "1, every dimension rotated")
    rotary_dim = int(head_dim * share)
    if rotary_dim < 2 or rotary_dim % 2:
        raise place.error(key, f"a share of {head_dim} that is an even number", share)
    return rotary_dim


def _original_context(fields: Fields, scaling: Fields, n_ctx: int) -> int:
    key = "original_max_position_embeddings"
    return fields.integer(key) if key in fields else scaling.integer(key, n_ctx)


def _yarn_from_config(scaling: Fields, freq: Frequencies, theta: float, factor: float, n_original: int) -> Rope:
    scale = yarn_scale(factor)
    if "mscale" in scaling and "mscale_all_dim" in scaling:
        mscale, all_dim = scaling.number("mscale"), scaling.number("mscale_all_dim")
        scale = yarn_scale(factor, mscale) / yarn_scale(factor, all_dim)
    scale = scaling.number("attention_factor", scale)
    fast, slow = scaling.number("beta_fast", 32.0), scaling.number("beta_slow", 1.0)
    truncate = scaling.flag("truncate", True)
    return finish(yarn(freq, theta, factor, n_original, fast, slow, truncate), scale)
