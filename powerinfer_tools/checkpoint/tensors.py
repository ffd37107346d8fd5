"""The tensors that a model of a given configuration has, under our names, with torch's shapes."""

from powerinfer_tools.checkpoint.config import Config

Shapes = dict[str, tuple[int, ...]]

ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
FFN = ("ffn_gate", "ffn_up", "ffn_down")


def required_shapes(config: Config) -> Shapes:
    """Every weight, and the biases of LayerNorms: [out, in] for matrices, [n] for vectors."""
    shapes: Shapes = {"token_embd.weight": (config.n_vocab, config.n_embd)}
    if config.learned_positions:
        shapes["position_embd.weight"] = (config.n_ctx, config.n_embd)
    if not config.tied:
        shapes["output.weight"] = (config.n_vocab, config.n_embd)
    shapes |= _norm(config, "output_norm")
    for i in range(config.n_layer):
        b = f"blk.{i}"
        shapes |= _norm(config, f"{b}.attn_norm") | _norm(config, f"{b}.ffn_norm")
        shapes |= {f"{b}.{part}.weight": shape for part, shape in _matrices(config).items()}
        if config.experts is not None:
            shapes[f"{b}.ffn_router.weight"] = (config.experts.n, config.n_embd)
    return shapes


def bias_shapes(config: Config, parts: tuple[str, ...] | None = None) -> Shapes:
    """The biases that the named matrices of each layer may have, or those of all matrices."""
    matrices = _matrices(config)
    return {
        f"blk.{i}.{part}.bias": matrices[part][:1]
        for i in range(config.n_layer)
        for part in matrices
        if parts is None or part in parts
    }


def _matrices(config: Config) -> Shapes:
    """One layer's matrices, [out, in]."""
    d, q, kv = config.n_embd, config.n_head * config.head_dim, config.n_head_kv * config.head_dim
    attention = {"attn_q": (q, d), "attn_k": (kv, d), "attn_v": (kv, d), "attn_output": (d, q)}
    gate = {"ffn_gate": (config.n_ff, d)} if config.gated else {}
    return {**attention, **gate, "ffn_up": (config.n_ff, d), "ffn_down": (d, config.n_ff)}


def _norm(config: Config, name: str) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (config.n_embd,)}
    if config.norm == "layer":
        shapes[f"{name}.bias"] = (config.n_embd,)
    return shapes
