"""How files store experts. The neurons of a layer are those of expert 0, then those of expert 1, and so on."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from powerinfer_tools.checkpoint.config import MAX_EXPERTS, Config, Experts
from powerinfer_tools.checkpoint.fields import LARGEST, Fields
from powerinfer_tools.checkpoint.gguf_config import Header, gguf_sources
from powerinfer_tools.checkpoint.source import FloatArray
from powerinfer_tools.checkpoint.sources import ReadRows, Rows, Source, stored
from powerinfer_tools.checkpoint.tensors import FFN, Shapes

GGUF_KEYS = "expert_count", "expert_used_count"
MOST = 1 << 15  # experts of all layers: each has tensors of its own, whose names are listed

Blocks = Sequence[tuple[str, int]]  # of each expert: their tensor, and where in it the expert's rows begin


def with_experts(config: Config, fields: Fields, keys: tuple[str, str], gating: str, routed_by: str) -> Config:
    """The config, whose n_ff is one expert's, of a model of experts. keys: how many there are, how many are chosen."""
    n = fields.integer(keys[0], high=min(MAX_EXPERTS, MOST // config.n_layer, LARGEST // config.n_ff))
    n_used = fields.integer(keys[1], high=n)
    return replace(config, n_ff=n * config.n_ff, experts=Experts(n, n_used, gating, routed_by))


def expert_sources(config: Config, names: Mapping[str, str]) -> dict[str, Source]:
    """The FFN's matrices. names: theirs of each part, with {i} for the layer and {e} for the expert; without {e} one
    tensor [n, out, in] holds all experts.
    """
    assert config.experts is not None
    n, sources = config.experts.n, {}
    each, d = config.n_ff // n, config.n_embd
    for i in range(config.n_layer):
        for part in FFN:
            shape = (d, each) if part == "ffn_down" else (each, d)
            theirs = [names[part].format(i=i, e=e) for e in range(n)]
            packed = "{e}" not in names[part]
            needs: Shapes = dict.fromkeys(theirs, (n, *shape) if packed else shape)
            blocks = [(name, e * shape[0] if packed else 0) for e, name in enumerate(theirs)]
            join = _side_by_side if part == "ffn_down" else _one_by_one
            sources[f"blk.{i}.{part}.weight"] = join(blocks, shape, needs)
    return sources


def gguf_expert_sources(header: Header, config: Config) -> dict[str, Source]:
    """All of a GGUF file's tensors: experts in one for each part, or, in files of 2023, in one for each expert."""
    packed = "blk.0.ffn_down_exps.weight" in header.file.tensors
    names = {part: f"blk.{{i}}.{part}_exps.weight" if packed else f"blk.{{i}}.{part}.{{e}}.weight" for part in FFN}
    sources = gguf_sources(header, config) | expert_sources(config, names)
    for i in range(config.n_layer):
        router = sources[f"blk.{i}.ffn_router.weight"]
        sources[f"blk.{i}.ffn_router.weight"] = stored(f"blk.{i}.ffn_gate_inp.weight", router.shape)
    return sources


def _one_by_one(blocks: Blocks, shape: tuple[int, int], needs: Shapes) -> Source:
    """The rows of each expert's matrix after those of the one before; shape: of each."""

    def read(read_rows: ReadRows, rows: Rows) -> FloatArray:
        found, owner = np.empty((len(rows), shape[1]), np.float32), rows // shape[0]
        for e in np.unique(owner):
            name, first = blocks[e]
            found[owner == e] = read_rows(name, first + rows[owner == e] - e * shape[0])
        return found

    return Source((len(blocks) * shape[0], shape[1]), needs, read)


def _side_by_side(blocks: Blocks, shape: tuple[int, int], needs: Shapes) -> Source:
    """The columns of each expert's matrix after those of the one before."""

    def read(read_rows: ReadRows, rows: Rows) -> FloatArray:
        return np.concatenate([read_rows(name, first + rows) for name, first in blocks], axis=1)

    return Source((shape[0], len(blocks) * shape[1]), needs, read)
