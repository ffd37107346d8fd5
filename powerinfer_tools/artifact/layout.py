"""The artifact's key and tensor names, and the table of tensors that an artifact of given choices holds.

An artifact is a GGUF file, version 3, little-endian. Within a layer the FFN neurons are stored in falling order of
firing frequency; shapes below are GGUF's (fastest dimension first), so a row of `n_embd` numbers is contiguous.

    token_embd.weight              [n_embd, n_vocab]
    position_embd.weight           [n_embd, n_ctx]               where positions are learned; row p is position p
    rope_inv_freq.weight           [rotary_dim / 2]       F32    where a layer rotates; scaling applied
    output_norm.weight .bias       [n_embd]               F32
    output.weight                  [n_embd, n_vocab]             absent where tied to token_embd; of any type
    blk.N.attn_norm.weight .bias   [n_embd]               F32
    blk.N.attn_q.weight            [n_embd, n_head * head_dim]        half-split rotary layout, .bias F32
    blk.N.attn_k|v.weight          [n_embd, n_head_kv * head_dim]     .bias F32
    blk.N.attn_output.weight       [n_head * head_dim, n_embd]        .bias F32
    blk.N.ffn_norm.weight .bias    [n_embd]               F32
    blk.N.ffn_neurons.weight       [n_embd, rows, n_ff]          a neuron's bundle: gate?, up, down (transposed)
    blk.N.ffn_select.weight        [n_embd, n_ff]                layers in mode gate: the row that decides, apart
    blk.N.ffn_gate.bias ffn_up.bias [n_ff]                F32
    blk.N.ffn_down.bias            [n_embd]               F32
    blk.N.ffn_order.weight         [n_ff]                 I32    the checkpoint's index of each stored neuron
    blk.N.ffn_frequency.weight     [n_ff]                 F32    share of calibration tokens that fired it, falling
    blk.N.ffn_router.weight        [n_embd, n_expert]     F32    models of experts
    blk.N.ffn_expert.weight        [n_ff]                 I32    likewise: the expert of each stored neuron
    blk.N.predictor_in.weight      [n_embd, rank]                layers in mode predictor
    blk.N.predictor_out.weight     [rank, n_ff - always]         stored neurons [always, n_ff)
    blk.N.predictor_out.bias       [n_ff - always]        F32    the threshold is already taken off: let through if >= 0

The row that decides whether a neuron fires is the gate row of a gated FFN and the up row of a plain one. In mode
`predictor` it is the first row of the bundle (rows = 3 or 2); in mode `gate` it lies apart in ffn_select, and the
bundle has the others (rows = 2: up, down; or 1: down).

logits of the predictor: W_out . relu(W_in . x) + bias where `powerinfer.predictor_relu` is true, else
W_out . (W_in . x) + bias; x is what `powerinfer.predictor_input` says: `ffn_input`, normalised, or `stream`, what the
FFN's norm takes.
"""

from dataclasses import dataclass

from powerinfer_tools.checkpoint.config import Config

FORMAT_VERSION = 2
ALIGNMENT = 4096  # tensors begin on a page, so that slices can be read past the page cache

QUANTS = ("f32", "f16", "q8_0", "q4_0")

# keys, beside the standard {arch}.* and tokenizer.* ones
KEY_VERSION = "powerinfer.version"  # uint32
KEY_ACTIVATION = "powerinfer.activation"  # string, one of config.ACTIVATIONS
KEY_GATED = "powerinfer.gated"  # bool
KEY_THRESHOLDS = "powerinfer.activation_threshold"  # float32 [n_layer]
KEY_NORM = "powerinfer.norm"  # string, one of config.NORMS; the structure of a layer is told in config.Config
KEY_LEARNED_POSITIONS = "powerinfer.learned_positions"  # bool
KEY_PARALLEL = "powerinfer.parallel"  # bool
KEY_QK_NORM = "powerinfer.qk_norm"  # bool
KEY_SUB_NORMS = "powerinfer.sub_norms"  # bool
KEY_SOFTCAP = "powerinfer.logit_softcap"  # float32, 0: none
KEY_ROTARY = "powerinfer.rotary"  # int32 [n_layer]: 1 where the layer rotates; where there is a rope
KEY_MODES = "powerinfer.ffn_mode"  # int32 [n_layer]: 1 gate, 2 predictor
KEY_ALWAYS = "powerinfer.always"  # int32 [n_layer]: stored neurons [0, always) are computed unasked
KEY_PREDICTOR_RELU = "powerinfer.predictor_relu"  # bool
KEY_PREDICTOR_INPUT = "powerinfer.predictor_input"  # string, one of PREDICTOR_INPUTS
KEY_ROPE_SCALE = "powerinfer.rope_scale"  # float32; where there is a rope
KEY_TIED = "powerinfer.tied"  # bool
KEY_QUANT = "powerinfer.quant"  # string, what was asked for
KEY_PROVENANCE = "powerinfer.provenance"  # string, JSON: digests, tool version, arguments, figures of the build
KEY_DATA_SHA256 = "powerinfer.data_sha256"  # string, over all tensor data, from data offset to the end of the file
KEY_TOKENIZER = "tokenizer.huggingface.json"  # string, tokenizer.json verbatim
KEY_TEMPLATE = "tokenizer.chat_template"  # string
KEY_SPECIAL = "powerinfer.special"  # string, JSON: the checkpoint's special tokens (bos, eos, add_bos, ...)
KEY_PLACEMENT_VRAM = "powerinfer.placement.vram"  # int32 [n_layer]: k1
KEY_PLACEMENT_RAM = "powerinfer.placement.ram"  # int32 [n_layer]: k2

# models of experts only
KEY_EXPERTS = "powerinfer.experts.n"  # uint32
KEY_EXPERTS_USED = "powerinfer.experts.n_used"  # uint32
KEY_GATING = "powerinfer.experts.gating"  # string, one of config.GATINGS
KEY_ROUTED_BY = "powerinfer.experts.routed_by"  # string, one of config.ROUTER_INPUTS

MODE_GATE, MODE_PREDICTOR = 1, 2
MODE_NAMES = {MODE_GATE: "gate", MODE_PREDICTOR: "predictor"}

INPUT_FFN, INPUT_STREAM = PREDICTOR_INPUTS = ("ffn_input", "stream")

BLOCK = {"f32": (1, 4), "f16": (1, 2), "q8_0": (32, 34), "q4_0": (32, 18), "i32": (1, 4)}
"""type: (elements of a block, bytes of a block)."""

TYPE_ID = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8, "i32": 26}
"""ggml's numbers of the types."""


def norm_key(norm: str) -> str:
    """The key of the norm's epsilon, after `{arch}.`; norm: one of config.NORMS."""
    return "attention.layer_norm_epsilon" if norm == "layer" else "attention.layer_norm_rms_epsilon"


@dataclass(frozen=True)
class LayerPlan:
    """What the build chose for one layer: the mode, the predictor's rank (0: none), the prefix computed unasked."""

    mode: int
    rank: int = 0
    always: int = 0


@dataclass(frozen=True)
class TensorPlan:
    """One tensor to be written. shape is GGUF's ne (fastest first); type is a key of BLOCK."""

    name: str
    type: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        n = 1
        for d in self.shape:
            n *= d
        elements, size = BLOCK[self.type]
        return n // elements * size


def matrix_type(quant: str, row: int) -> str:
    """The type that rows of `row` elements get: `quant`, or f16 where the row is no multiple of its block."""
    return quant if row % BLOCK[quant][0] == 0 else "f16"


def tensor_table(
    config: Config, layers: list[LayerPlan], quant: str, biases: frozenset[str], head: str | None = None
) -> list[TensorPlan]:
    """Every tensor of the artifact, in file order. `biases`: the checkpoint's bias tensors, by their names here; head:
    the type of output.weight, where it is not `quant`.
    """
    d, kv = config.n_embd, config.n_head_kv * config.head_dim
    q = config.n_head * config.head_dim
    table: list[TensorPlan] = []

    def matrix(name: str, row: int, *dims: int, type: str = quant) -> None:
        table.append(TensorPlan(f"{name}.weight", matrix_type(type, row), (row, *dims)))

    def vector(name: str, n: int, type: str = "f32") -> None:
        table.append(TensorPlan(name, type, (n,)))

    def bias(name: str, n: int) -> None:
        if f"{name}.bias" in biases:
            vector(f"{name}.bias", n)

    def norm(name: str) -> None:
        vector(f"{name}.weight", d)
        bias(name, d)

    matrix("token_embd", d, config.n_vocab)
    if config.learned_positions:
        matrix("position_embd", d, config.n_ctx)
    if config.rope is not None:
        vector("rope_inv_freq.weight", len(config.rope.inv_freq))
    for i, layer in enumerate(layers):
        b = f"blk.{i}"
        norm(f"{b}.attn_norm")
        for part, n in (("q", q), ("k", kv), ("v", kv)):
            matrix(f"{b}.attn_{part}", d, n)
            bias(f"{b}.attn_{part}", n)
        matrix(f"{b}.attn_output", q, d)
        bias(f"{b}.attn_output", d)
        norm(f"{b}.ffn_norm")
        apart = layer.mode == MODE_GATE
        if apart:
            matrix(f"{b}.ffn_select", d, config.n_ff)
        matrix(f"{b}.ffn_neurons", d, config.n_rows - apart, config.n_ff)
        bias(f"{b}.ffn_gate", config.n_ff)
        bias(f"{b}.ffn_up", config.n_ff)
        bias(f"{b}.ffn_down", d)
        vector(f"{b}.ffn_order.weight", config.n_ff, "i32")
        vector(f"{b}.ffn_frequency.weight", config.n_ff)
        if config.experts is not None:
            table.append(TensorPlan(f"{b}.ffn_router.weight", "f32", (d, config.experts.n)))
            vector(f"{b}.ffn_expert.weight", config.n_ff, "i32")
        if layer.mode == MODE_PREDICTOR:
            asked = config.n_ff - layer.always
            matrix(f"{b}.predictor_in", d, layer.rank)
            matrix(f"{b}.predictor_out", layer.rank, asked)
            vector(f"{b}.predictor_out.bias", asked)
    norm("output_norm")
    if not config.tied:
        matrix("output", d, config.n_vocab, type=head or quant)
    return table
