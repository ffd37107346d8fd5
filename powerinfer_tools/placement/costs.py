"""Bytes of everything that an artifact holds and that decoding needs: the one place where sizes are computed.

A layer falls into parts that can be placed apart:

    dense    attention, norms, predictor_in, ffn_down.bias: one block, on vram or ram, with the layer's KV cache
    beside   what is read for every token to choose a neuron: its expert, its ffn_select or predictor_out row and its
             biases. It goes to vram with its neuron; a neuron on disk leaves it in ram
    bundle   the neuron's rows in ffn_neurons: on vram, ram or disk
    table    ffn_order and ffn_frequency, not read while decoding, and the experts' router, which is: in ram

On a card rows are padded to 16 bytes, tensors to 256 and what is allocated to 2 MiB, beside its context and the scratch
of what runs there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from powerinfer_tools.artifact.layout import BLOCK, MODE_PREDICTOR, LayerPlan, TensorPlan, matrix_type, tensor_table
from powerinfer_tools.checkpoint.config import Config
from powerinfer_tools.errors import PowerinferError

KV_ELEMENT_BYTES = 2  # the cache is float16

# what the engine works with (native/src/session.h)
BATCH = 256  # tokens of a prompt that are worked on at once, at most
TILES = 8192 + 16 * 288 + BATCH * 64  # float32 numbers of a thread's matrix tiles, or as many bytes
QUERIES, TILE_ROWS = 32, 16  # tokens whose attention is computed at once; positions of a tile
PIECE = 256  # neurons of an expert that a batch computes at once
CHUNKS = 24  # partial sums of an FFN

# on a card (native/src/model_device.cpp, native/cuda)
CARD_ROW, CARD_TENSOR = 16, 256  # what rows and tensors are padded to
CARD_PAGE = 2 << 20  # its memory is mapped in these: weights, KV caches and scratches take whole ones
CARD_STAGING = 8 << 20  # of ram, through which neurons are lent
CARD_GRAPHS = 128 << 10  # of a layer's commands, kept for tokens to come
CARD_LANES = 32  # what vectors are padded to
CARD_PIECE = 8192  # neurons of a batch that are computed at once
CARD_SPLITS, CARD_SEGMENTS, CARD_SHARES = 64, 4096, 96  # of a head's positions, a layer's neurons, its sum, at most

# with neurons on disk (native/src/disk.cpp)
PAGE = 4096
TABLE_ROWS = 256  # of the embedding that are read together
AHEAD = 64  # neurons of a layer that are read before it asks for them, with two layers under way
MISS_BYTES, READ_BYTES = 16, 32  # of one neuron that is read, and of its read

BESIDE = ("ffn_expert.weight", "ffn_select.weight", "ffn_gate.bias", "ffn_up.bias")
PREDICTOR = ("predictor_out.weight", "predictor_out.bias")
ROUTER = "ffn_router.weight"
TABLE = ("ffn_order.weight", "ffn_frequency.weight", ROUTER)
BUNDLE = "ffn_neurons.weight"


@dataclass(frozen=True)
class OnCard:
    """Bytes of one layer on a card, rows padded: the block, its KV cache; the others are per neuron."""

    dense: int
    kv: int
    bundle: int
    beside: int
    predictor: int


@dataclass(frozen=True)
class LayerCosts:
    """Bytes of one layer. `bundle`, `beside` and `predictor` are per neuron; `predictor` only from neuron `always` on.

    first: the bundle's row that decides whether the neuron fires, read where the predictor lets it through (0 in
    mode gate, whose deciding row lies beside); the rest of the bundle is read where it fires. router: of the table,
    what chooses experts; 0 without. Neurons of experts are never on a card.
    """

    dense: int
    kv: int
    table: int
    router: int
    bundle: int
    first: int
    beside: int
    predictor: int
    always: int
    n_ff: int
    on_card: OnCard

    def stored_beside(self, n: int) -> int:
        """Bytes beside the bundles of stored neurons [0, n)."""
        return n * self.beside + max(0, n - self.always) * self.predictor

    @property
    def weights(self) -> int:
        """All tensor bytes of the layer."""
        return self.dense + self.table + self.n_ff * self.bundle + self.stored_beside(self.n_ff)


@dataclass(frozen=True)
class Costs:
    """Bytes of an artifact and of what runs it. head: output matrix and norm; host: embeddings and the like, in ram;
    scratch: of the processor, of all contexts; card_head: the head on a card; card_fixed: what a card's context,
    scratch and padding take as soon as it is used; logits: of one token.

    taking_part: of the neurons, the share that any token's experts have; contexts: KV caches and scratches;
    routed_early: experts are chosen by a layer's own input.
    """

    layers: tuple[LayerCosts, ...]
    head: int
    host: int
    scratch: int
    card_head: int
    card_fixed: int
    logits: int
    taking_part: float = 1.0
    contexts: int = 1
    routed_early: bool = False

    @property
    def weights(self) -> int:
        """All tensor bytes of the artifact."""
        return self.head + self.host + sum(layer.weights for layer in self.layers)

    @property
    def kv(self) -> int:
        """Bytes of the KV caches."""
        return self.contexts * sum(layer.kv for layer in self.layers)

    @property
    def needed(self) -> int:
        """Bytes of memory with which nothing stays on disk and no card is used."""
        return self.weights + self.kv + self.scratch


def artifact_costs(
    config: Config,
    plans: Sequence[LayerPlan],
    *,
    quant: str,
    biases: frozenset[str],
    ctx_size: int,
    threads: int = 1,
    head: str | None = None,
    contexts: int = 1,
    card_context: int = 0,
    stand_in: bool = False,
) -> Costs:
    """The bytes of the artifact that `split` makes of these choices, run with `ctx_size` positions and `threads`.

    head: the type of output.weight, where it is not `quant`; card_context: what a card takes before anything is there;
    stand_in: a thread stands in for the card, in tests.
    """
    if len(plans) != config.n_layer:
        raise PowerinferError(f"expected one plan a layer ({config.n_layer}), found {len(plans)}", "mismatch")
    if not 1 <= ctx_size <= config.n_ctx:
        raise PowerinferError(f"--ctx-size: expected 1 to {config.n_ctx}, found {ctx_size}", "usage")
    parts: list[dict[str, TensorPlan]] = [{} for _ in plans]
    output = host = card_head = 0
    table = tensor_table(config, list(plans), quant, biases, head)
    for tensor in table:
        if tensor.name.startswith("blk."):
            _, number, name = tensor.name.split(".", 2)
            parts[int(number)][name] = tensor
        elif is_head(config, tensor.name):
            output += tensor.n_bytes
            card_head += _card_bytes(tensor)
        else:
            host += tensor.n_bytes
    kv = kv_bytes(config, 1, ctx_size)
    layers = tuple(_layer_costs(config, plan, part, kv) for plan, part in zip(plans, parts, strict=True))
    scratch = contexts * scratch_bytes(config, plans, ctx_size, threads)
    padding = CARD_TENSOR * len(table) + CARD_PAGE
    card_scratch = stand_in_scratch_bytes if stand_in else card_scratch_bytes
    card_fixed = card_context + contexts * card_scratch(config, plans, ctx_size) + padding
    return Costs(
        layers=layers,
        head=output,
        host=host,
        scratch=scratch,
        card_head=card_head,
        card_fixed=card_fixed,
        logits=4 * config.n_vocab,
        taking_part=config.taking_part,
        contexts=contexts,
        routed_early=config.experts is not None and config.experts.routed_by == "layer_input",
    )


def is_head(config: Config, name: str) -> bool:
    """Whether a tensor, of no layer, is the output head's."""
    return name.startswith("output") or (config.tied and name == "token_embd.weight")


def _layer_costs(config: Config, plan: LayerPlan, tensors: dict[str, TensorPlan], kv: int) -> LayerCosts:
    def total(names: Sequence[str], size: Callable[[TensorPlan], int] = lambda tensor: tensor.n_bytes) -> int:
        return sum(size(tensors[name]) for name in names if name in tensors)

    apart = (BUNDLE, *BESIDE, *PREDICTOR, *TABLE)
    block = [name for name in tensors if name not in apart]
    bundle = tensors[BUNDLE]
    asked = config.n_ff - plan.always
    return LayerCosts(
        dense=total(block),
        kv=kv,
        table=total(TABLE),
        router=total([ROUTER]),
        bundle=bundle.n_bytes // config.n_ff,
        first=bundle.n_bytes // config.n_ff // bundle.shape[1] if plan.mode == MODE_PREDICTOR else 0,
        beside=total(BESIDE) // config.n_ff,
        predictor=total(PREDICTOR) // asked if asked else 0,
        always=plan.always if plan.mode == MODE_PREDICTOR else config.n_ff,
        n_ff=config.n_ff,
        on_card=OnCard(
            dense=total(block, _card_bytes),
            kv=kv // config.head_dim * _up(config.head_dim, CARD_ROW // KV_ELEMENT_BYTES),
            bundle=_card_bytes(bundle) // config.n_ff,
            beside=total(BESIDE, _card_bytes) // config.n_ff,
            predictor=total(PREDICTOR, _card_bytes) // asked if asked else 0,
        ),
    )


def _card_bytes(tensor: TensorPlan) -> int:
    """Bytes of a tensor on a card, its rows padded; numbers of neurons are one row, whose padding is the tensor's."""
    if len(tensor.shape) == 1:
        return tensor.n_bytes
    elements, size = BLOCK[tensor.type]
    row = tensor.shape[0] // elements * size
    return tensor.n_bytes // row * _up(row, CARD_ROW)


def kv_bytes(config: Config, n_layer: int, n_positions: int) -> int:
    """Bytes of keys and values of `n_positions` in `n_layer` layers: 2 * n_head_kv * head_dim float16 numbers each."""
    return 2 * n_layer * n_positions * config.n_head_kv * config.head_dim * KV_ELEMENT_BYTES


def scratch_bytes(config: Config, plans: Sequence[LayerPlan], ctx_size: int, threads: int) -> int:
    """The engine's working memory beside weights and cache, to the byte (native/src/session.cpp allocates it once).

    A thread: six numbers a neuron, attention scores, matrix tiles. A token: residual, normalised input, queries,
    keys, values, experts, what the predictor says, gate and up; one for decoding, a batch of them for prompts, and
    the widest in blocks. Partial sums, logits, angles. With experts a prompt's gate and up are a piece of one
    expert's, whose rows are brought together, as are the inputs of those that chose it, and what all experts add.
    """
    d, wide = config.n_embd, max(config.n_embd, config.n_head * config.head_dim)
    q, kv = config.n_head * config.head_dim, config.n_head_kv * config.head_dim
    rank = max((plan.rank for plan in plans), default=0)
    angles = 0 if config.rope is None else 2 * len(config.rope.inv_freq)
    experts = 0 if config.experts is None else config.experts.n
    together = config.n_ff if config.experts is None else PIECE
    thread = 6 * config.n_ff + QUERIES * -(-ctx_size // TILE_ROWS) * TILE_ROWS + TILES
    decode = (2 + CHUNKS) * d + wide + rank + q + 2 * kv + experts + config.n_vocab
    token = d + wide + q + 2 * kv + experts + 2 * together + config.n_ff + rank + angles
    batch = min(BATCH, ctx_size)
    gathered = 0 if config.experts is None else config.n_ff + batch * (1 + 2 * d) + PIECE * (3 * d + 2)
    blocks = wide // 32 + rank // 32 + batch * -(-max(wide, together, rank) // 32)  # of 32 numbers
    return 4 * (threads * thread + decode + gathered + batch * token) + 40 * blocks  # scale, sum and 32 bytes


def card_scratch_bytes(config: Config, plans: Sequence[LayerPlan], ctx_size: int) -> int:
    """The most that a session takes on a card beside its KV cache (native/cuda/session.cu), with the rest of that one's
    last page.

    A token: residuals, normalised input, heads, queries, keys, values, predictor, sums; these in 16 bits, too; a piece
    of neurons: gate, up, forecast, and what they give in 16 bits. For decoding: parts of heads and sums, neurons,
    logits. Of experts no neurons are there.
    """
    n_ff = config.n_ff if config.experts is None else 0
    batch, d, q = min(BATCH, ctx_size), config.n_embd, config.n_head * config.head_dim
    rank = _up(max((plan.rank for plan in plans), default=0), CARD_LANES)
    wide, heads, piece = _up(d, CARD_LANES), _up(q, CARD_LANES), _up(min(CARD_PIECE, n_ff), CARD_LANES)
    angles = 0 if config.rope is None else 2 * len(config.rope.inv_freq)
    kv = config.n_head_kv * config.head_dim
    token = 2 * d + wide + heads + q + 2 * kv + angles + 2 * rank + 3 * piece
    token += (max(wide, heads) + rank + piece) // 2 + 3
    decode = CARD_SPLITS * config.n_head * (config.head_dim + 10) + CARD_SHARES * d + config.n_vocab
    decode += 2 * n_ff + 3 * CARD_SEGMENTS * (n_ff > 0) + wide + heads + rank + 14 * config.n_layer
    card = _up(4 * (batch * token + decode) + 64 * CARD_TENSOR, CARD_PAGE)
    return card + _up(config.n_layer * CARD_GRAPHS, CARD_PAGE) + CARD_PAGE


def stand_in_scratch_bytes(config: Config, plans: Sequence[LayerPlan], ctx_size: int) -> int:
    """The same of what stands in for a card in tests, and works as the processor does (native/src/host_device.cpp)."""
    return scratch_bytes(config, plans, ctx_size, threads=1) + 4 * min(BATCH, ctx_size) * config.n_embd


def visit_bytes(config: Config, quant: str, n: int | None = None) -> int:
    """Bytes on a card of n neurons of a layer, else all, which visit for a prompt."""
    elements, size = BLOCK[matrix_type(quant, config.n_embd)]
    row = _up(config.n_embd // elements * size, CARD_ROW)
    return (config.n_ff if n is None else n) * (config.n_rows * row + 8) + 5 * CARD_TENSOR


def mailbox_bytes(config: Config, plans: Sequence[LayerPlan], ctx_size: int, lends: bool = True) -> int:
    """Memory that a session shares with a card: residuals, sums, predictors' hidden layers, logits of one token; lends:
    and what neurons are lent through. A score's logits of a whole batch come on top."""
    rank = max((plan.rank for plan in plans), default=0)
    staging = CARD_STAGING if lends else 0
    return 4 * (min(BATCH, ctx_size) * (3 * config.n_embd + 2 * rank) + config.n_vocab) + staging


@dataclass(frozen=True)
class DiskCosts:
    """Bytes of an artifact's weights where only the first neurons of each layer stay in memory, to the byte.

    bundles: of each layer, where they begin in the file and bytes of one; table: where the embedding begins, its bytes
    and those of a row, where it is no output head, too. Tensors are held in whole pages, as they lie in the file from
    data_offset to file_bytes, but for the table and each layer's tail: the whole pages after its resident neurons.
    """

    data_offset: int
    file_bytes: int
    n_ff: int
    bundles: tuple[tuple[int, int], ...]
    table: tuple[int, int, int] | None

    @property
    def whole(self) -> int:
        """All tensors, in whole pages."""
        return _pages(self.file_bytes) - self.data_offset // PAGE * PAGE

    def tails(self, resident: Sequence[int]) -> list[int]:
        """Bytes of each layer that are not in memory."""
        return [
            max(0, (begin + self.n_ff * size) // PAGE * PAGE - _pages(begin + k * size))
            for (begin, size), k in zip(self.bundles, resident, strict=True)
        ]

    def weights(self, resident: Sequence[int]) -> int:
        """What stays in memory."""
        begin, n_bytes, _ = self.table or (0, 0, 0)
        return self.whole - sum(self.tails(resident)) - max(0, (begin + n_bytes) // PAGE * PAGE - _pages(begin))

    def cache(self, resident: Sequence[int], slots: int, transit: int) -> int:
        """Memory that the cache, the neurons in transit and a tail that is read whole share."""
        tails = self.tails(resident)
        cold = [(size, k) for (_, size), k, tail in zip(self.bundles, resident, tails, strict=True) if tail]
        if not cold:
            return 0
        kept = sum((min(slots, self.n_ff - k) + 1) * size for size, k in cold)
        return max(_pages(kept + (transit + 1) * max(size for size, _ in cold)), *tails)

    def beside(self, resident: Sequence[int], slots: int, transit: int) -> int:
        """Buffers that reads arrive in, and the tables of what is where."""
        tails = self.tails(resident)
        cold = [(size, k) for (_, size), k, tail in zip(self.bundles, resident, tails, strict=True) if tail]
        widest = max((size for size, _ in cold), default=0)
        landing = min(transit * (_pages(widest) + PAGE), max(tails) + 2 * CHUNKS * PAGE)
        tables = sum(6 * self.n_ff + 8 * min(slots, self.n_ff - k) for _, k in cold)
        rows = 0 if self.table is None else TABLE_ROWS * (_pages(self.table[2]) + PAGE)
        landing += 2 * AHEAD * (_pages(widest) + PAGE) if cold else 0
        return rows + landing + tables + (transit + 2 * AHEAD) * (MISS_BYTES + READ_BYTES) + 8 * (transit + slots)

    def total(self, resident: Sequence[int], slots: int, transit: int) -> int:
        """All of it."""
        parts = (self.weights(resident), self.cache(resident, slots, transit), self.beside(resident, slots, transit))
        return sum(parts)


def disk_scratch_bytes(config: Config, plans: Sequence[LayerPlan], threads: int) -> int:
    """What a session needs beside scratch_bytes where neurons are on disk: places, choices, forecasts."""
    rank = max((plan.rank for plan in plans), default=0)
    return 4 * config.n_ff * (threads + 4) + 4 * (config.n_embd + rank) + 40 * (config.n_embd // 32 + rank // 32)


def _up(n: int, step: int) -> int:
    return -(-n // step) * step


def _pages(n_bytes: int) -> int:
    return _up(n_bytes, PAGE)
