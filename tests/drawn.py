"""Random small models of any structure, in memory: no family's files are needed to test what a Config can say."""

import hashlib
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from powerinfer_tools.checkpoint import Checkpoint, Config, Experts, Rope
from powerinfer_tools.checkpoint.source import check_rows
from powerinfer_tools.checkpoint.tensors import bias_shapes, required_shapes
from tests.tiny import make_tokenizer

FloatArray = npt.NDArray[np.float32]


def rope_of(rotary_dim: int, backwards: bool = False, scale: float = 1.0) -> Rope:
    """Frequencies of base 10000, negative where the model rotates the other way."""
    inv_freq = 10000.0 ** -(np.arange(rotary_dim // 2) * 2 / rotary_dim)
    return Rope((-inv_freq if backwards else inv_freq).astype(np.float32), scale)


PLAIN = Config(
    arch="llama",
    name="drawn",
    n_layer=2,
    n_embd=64,
    n_ff=160,
    n_head=4,
    n_head_kv=2,
    head_dim=16,
    n_vocab=300,
    n_ctx=256,
    norm_eps=1e-5,
    activation="relu",
    gated=True,
    tied=False,
    rope=rope_of(16),
    thresholds=(0.0, 0.0),
)


def drawn_config(**fields: Any) -> Config:
    """PLAIN, but for what is said of it; one threshold a layer."""
    n_layer = fields.get("n_layer", PLAIN.n_layer)
    return replace(PLAIN, **{"thresholds": (0.0,) * n_layer, **fields})


MUCH: dict[str, Any] = {  # at once
    "n_layer": 12,
    "n_embd": 72,
    "n_ff": 3 * 277,
    "n_head": 6,
    "head_dim": 20,
    "norm": "layer",
    "qk_norm": True,
    "softcap": 20.0,
    "rotary": tuple(i != 5 for i in range(12)),
}
STRUCTURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer norm": {"norm": "layer"},
    "learned positions": {"learned_positions": True, "rope": None, "gated": False},
    "parallel": {"parallel": True},
    "qk norm": {"qk_norm": True},
    "sub norms": {"sub_norms": True, "activation": "relu2"},
    "softcap": {"softcap": 2.5},
    "partial rotary": {"rope": rope_of(6, scale=1.3)},
    "backwards": {"rope": rope_of(16, backwards=True)},
    "some layers rotate": {"n_layer": 12, "rotary": tuple(i % 4 != 3 for i in range(12))},
    "none rotates": {"rope": None},
    "experts": {"experts": Experts(5, 2, "softmax", "ffn_input"), "activation": "drelu"},
    "routed early": {"n_layer": 12, "experts": Experts(8, 3, "sigmoid", "layer_input")},
    "plain experts": {"gated": False, "experts": Experts(4, 1, "sigmoid", "ffn_input")},
    "much with experts": {**MUCH, "experts": Experts(3, 2, "softmax", "layer_input")},
    "much in parallel": {**MUCH, "parallel": True},
    "all": {
        "n_layer": 12,
        "n_embd": 72,
        "n_ff": 161,
        "n_head": 6,
        "head_dim": 20,
        "norm": "layer",
        "parallel": True,
        "qk_norm": True,
        "sub_norms": True,
        "softcap": 20.0,
        "rope": rope_of(12, backwards=True, scale=0.8),
        "rotary": tuple(i != 5 for i in range(12)),
        "tied": True,
    },
}
"""What a Config can say of a layer, each alone and together: fields for drawn_config."""


class DrawnCheckpoint(Checkpoint):
    """Random weights for `config`; biases: the parts of a layer that have one."""

    def __init__(self, config: Config, biases: tuple[str, ...] = (), seed: int = 0) -> None:
        self.config, self.path, self.notes = config, Path(config.name), []
        self.tokenizer_json, self.chat_template = _tokenizer(config.n_vocab), None
        self.special = {"bos": 0, "eos": [1], "add_bos": True, "bos_token": "<s>", "eos_token": "</s>"}
        self.metadata = {"name": config.name}
        rng = np.random.default_rng(seed)
        self.shapes = required_shapes(config) | bias_shapes(config, biases)
        self.tensors = {name: _draw(rng, name, shape) for name, shape in self.shapes.items()}

    def names(self) -> frozenset[str]:
        return frozenset(self.tensors)

    def read(self, name: str, rows: slice | None = None) -> FloatArray:
        begin, end = check_rows(self.path, self.shapes, name, rows)
        return self.tensors[name][begin:end].copy()

    def digest(self) -> str:
        digest = hashlib.sha256(str(self.config).encode())
        for name in sorted(self.tensors):
            digest.update(self.tensors[name].tobytes())
        return digest.hexdigest()


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> FloatArray:
    numbers = rng.standard_normal(shape)
    if name.endswith("norm.weight"):
        numbers = 1 + 0.1 * numbers
    elif name.endswith(".bias"):
        numbers *= 0.1
    elif not name.startswith(("token_embd", "position_embd")):
        numbers /= shape[1] ** 0.5
    return numbers.astype(np.float32)


@cache
def _tokenizer(n_vocab: int) -> str:
    return make_tokenizer(n_vocab)
