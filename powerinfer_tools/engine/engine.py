"""Owns a native model and session: the context of one conversation."""

import ctypes as c
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from powerinfer_tools.engine import native
from powerinfer_tools.errors import PowerinferError

Logits = npt.NDArray[np.float32]

DEFAULT_CTX = 4096  # positions, where the model has as many: what a chat needs, at a bounded KV cache
MAX_THREADS = 256  # of the native engine


def default_threads() -> int:
    """One a processor."""
    return min(MAX_THREADS, len(os.sched_getaffinity(0)))


def default_ctx(n_ctx_train: int) -> int:
    """Positions of a context, of a model that has so many."""
    return min(DEFAULT_CTX, n_ctx_train)


@dataclass(frozen=True)
class ModelInfo:
    """Sizes in elements; weight_bytes of all tensors; resident, cache and disk_bytes: as held in memory; card_bytes:
    of the weights on a card, card_context_bytes: what it takes before anything is stored there."""

    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_vocab: int
    n_ctx_train: int
    weight_bytes: int
    resident_bytes: int
    cache_bytes: int
    disk_bytes: int
    card_bytes: int
    card_context_bytes: int


@dataclass(frozen=True)
class CardLimits:
    """What lies on a card, and not in memory. dense: of each layer whether its dense block does (norms, attention with
    its KV cache, predictor_in); neurons: how many of each layer's first do, one of native.chunk_bounds, of experts 0;
    head: the output head; budget: bytes there, everything counted, 0: no limit; lend_from: batches of a prompt (256
    tokens at most) of at least so many are computed there with all neurons, 0: none is; device: cuda, or host (a thread
    in its place, for tests)."""

    dense: tuple[bool, ...]
    neurons: tuple[int, ...]
    head: bool = False
    budget: int = 0
    lend_from: int = 0
    device: str = "cuda"

    def __post_init__(self) -> None:
        if len(self.dense) != len(self.neurons):
            found = f"{len(self.dense)} and {len(self.neurons)}"
            raise PowerinferError(f"card: expected as many values in dense as in neurons, found {found}", "usage")


@dataclass(frozen=True)
class DiskLimits:
    """Which neurons stay on disk. resident: neurons of each layer that stay in memory, its first; slots: neurons of
    each layer that a cache can hold beside them; transit: neurons that a layer can read for one token.
    reader: best, io_uring or threads."""

    resident: tuple[int, ...]
    slots: int
    transit: int
    reader: str = "best"


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: repeat penalty, top-k, top-p, min-p, temperature, in this order; 0 is greedy."""

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64


@dataclass(frozen=True)
class Stats:
    """Counted since the last reset; seconds and bytes are of decoding, neurons over tokens and layers."""

    n_decode: int
    n_prefill: int
    bytes_decode: int
    neurons_active: int
    neurons_computed: int
    neurons_total: int
    seconds_attention: float
    seconds_predictor: float
    seconds_gate: float
    seconds_updown: float
    seconds_head: float
    seconds_other: float
    seconds_sync: float
    bytes_attention: int
    bytes_predictor: int
    bytes_gate: int
    bytes_updown: int
    bytes_head: int
    seconds_disk: float
    neurons_prefix: int
    neurons_cache: int
    neurons_disk: int
    disk_reads: int
    disk_bytes: int
    stream_bytes: int
    neurons_ahead: int
    neurons_ahead_asked: int
    seconds_card: float
    card_neurons: int
    card_neurons_fired: int
    card_read_bytes: int
    card_transfers: int
    card_waits: int
    card_bytes: int

    @property
    def active_ratio(self) -> float:
        """Share of neurons that fired in decoding."""
        return self.neurons_active / self.neurons_total if self.neurons_total else 0.0


@dataclass(frozen=True)
class LayerScore:
    """One layer's selection against the truth, in neuron occurrences over n_tokens."""

    n_tokens: int
    n_true: int
    n_predicted: int
    n_hit: int


class Model:
    """An artifact's weights in memory, read only: any number of engines may share them.

    limits: the neurons that stay on disk, which engines then read for each other, one call after the other.
    card: what lies on a card instead.
    """

    def __init__(self, path: Path | str, limits: DiskLimits | None = None, card: CardLimits | None = None) -> None:
        self._lib = native.library()
        self.handle = c.c_void_p()
        self.path = Path(path)
        disk = None if limits is None else c.byref(_disk_params(limits))
        there = None if card is None else c.byref(_card_params(card))
        native.check(self._lib.pi_model_open(os.fsencode(path), disk, there, c.byref(self.handle)), str(path))
        info = native.CModelInfo(struct_size=c.sizeof(native.CModelInfo))
        native.check(self._lib.pi_model_get_info(self.handle, c.byref(info)))
        self.info = ModelInfo(**{name: getattr(info, name) for name in ModelInfo.__dataclass_fields__})

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self._lib.pi_model_close(self.handle)


class Engine:
    """One context of a model. Errors of the native engine come as PowerinferError.

    model: an artifact's path, or weights that are already loaded. mode: auto (what the artifact says, layer by
    layer), dense, gate or predictor; uncut ignores the activation thresholds; kernels: 0 best, 1 scalar, 2 AVX2,
    3 AVX-512; ctx_size in positions; threads: default one a processor, up to MAX_THREADS.
    """

    def __init__(
        self,
        model: Model | Path | str,
        *,
        ctx_size: int | None = None,
        threads: int | None = None,
        mode: str = "auto",
        uncut: bool = False,
        kernels: int = 0,
    ) -> None:
        self._lib, self._session = native.library(), c.c_void_p()
        if mode not in native.MODES:
            raise PowerinferError(f"mode: expected {', '.join(native.MODES)}, found {mode}", "usage")
        self.model = model if isinstance(model, Model) else Model(model)
        self.info = self.model.info
        self.threads = threads or default_threads()
        self.ctx_size = ctx_size or default_ctx(self.info.n_ctx_train)
        if self.ctx_size > self.info.n_ctx_train:
            raise PowerinferError(
                f"--ctx-size: expected at most the model's {self.info.n_ctx_train}, found {self.ctx_size}", "usage"
            )
        params = native.CSessionParams(
            struct_size=c.sizeof(native.CSessionParams),
            n_ctx=self.ctx_size,
            n_threads=self.threads,
            mode=native.MODES[mode],
            uncut=uncut,
            kernels=kernels,
        )
        native.check(self._lib.pi_session_open(self.model.handle, c.byref(params), c.byref(self._session)))

    def close(self) -> None:
        """Frees the context; may be called twice. The weights go with their last user."""
        if self._session:
            self._lib.pi_session_close(self._session)
            self._session = c.c_void_p()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_session"):
            self.close()

    @property
    def position(self) -> int:
        """Tokens in the context."""
        n = c.c_size_t()
        native.check(self._lib.pi_position(self._session, c.byref(n)))
        return n.value

    def prefill(self, tokens: Sequence[int], logits: bool = False) -> Logits | None:
        """Appends a prompt, all neurons computed; returns the last token's logits [n_vocab] if asked."""
        ids, out = _ids(tokens), self._logits(1 if logits else 0)
        native.check(self._lib.pi_prefill(self._session, _pointer(ids), len(ids), _float_pointer(out)))
        return out[0] if out is not None else None

    def decode(self, token: int, logits: bool = False) -> Logits | None:
        """Appends one token through the sparse path; returns its logits [n_vocab] if asked."""
        out = self._logits(1 if logits else 0)
        native.check(self._lib.pi_decode(self._session, token, _float_pointer(out)))
        return out[0] if out is not None else None

    def score(self, tokens: Sequence[int]) -> tuple[Logits, list[LayerScore]]:
        """Appends tokens, only the selected neurons contributing: logits [n, n_vocab], and each layer's selection."""
        ids, out = _ids(tokens), self._logits(len(tokens))
        scores = (native.CLayerScore * self.info.n_layer)()
        native.check(self._lib.pi_score(self._session, _pointer(ids), len(ids), _float_pointer(out), scores))
        assert out is not None
        return out, [LayerScore(s.n_tokens, s.n_true, s.n_predicted, s.n_hit) for s in scores]

    def truncate(self, n: int) -> None:
        """Forgets everything from position n on."""
        native.check(self._lib.pi_truncate(self._session, n))

    def seed(self, seed: int) -> None:
        """Same seed, same calls, same tokens."""
        native.check(self._lib.pi_seed(self._session, seed & 0xFFFFFFFFFFFFFFFF))

    def sample(self, sampling: Sampling, recent: Sequence[int] = ()) -> int:
        """Draws the next token from the last logits; `recent`: the ids that the repeat penalty looks at."""
        how = native.CSampling(
            c.sizeof(native.CSampling), *(getattr(sampling, n) for n in Sampling.__dataclass_fields__)
        )
        ids, token = _ids(recent), c.c_int32()
        native.check(self._lib.pi_sample(self._session, c.byref(how), _pointer(ids), len(ids), c.byref(token)))
        return token.value

    def stats(self) -> Stats:
        """What was done since the engine was opened or reset_stats()."""
        stats = native.CStats(struct_size=c.sizeof(native.CStats))
        native.check(self._lib.pi_session_get_stats(self._session, c.byref(stats)))
        return Stats(**{name: getattr(stats, name) for name in Stats.__dataclass_fields__})

    def reset_stats(self) -> None:
        """Sets all counters to zero."""
        native.check(self._lib.pi_session_reset_stats(self._session))

    def memory(self) -> tuple[int, int]:
        """Bytes of the KV cache and of scratch."""
        kv, scratch = c.c_uint64(), c.c_uint64()
        native.check(self._lib.pi_session_bytes(self._session, c.byref(kv), c.byref(scratch)))
        return kv.value, scratch.value

    def card_memory(self) -> tuple[int, int]:
        """Bytes of the KV cache and of scratch on the card."""
        kv, scratch = c.c_uint64(), c.c_uint64()
        native.check(self._lib.pi_session_card_bytes(self._session, c.byref(kv), c.byref(scratch)))
        return kv.value, scratch.value

    def _logits(self, rows: int) -> Logits | None:
        return np.empty((rows, self.info.n_vocab), np.float32) if rows else None


def _disk_params(limits: DiskLimits) -> native.CDiskParams:
    return native.CDiskParams(
        struct_size=c.sizeof(native.CDiskParams),
        reader=native.READERS[limits.reader],
        n_slots=limits.slots,
        n_transit=limits.transit,
        n_layer=len(limits.resident),
        n_resident=(c.c_uint32 * len(limits.resident))(*limits.resident),
    )


def _card_params(card: CardLimits) -> native.CCardParams:
    return native.CCardParams(
        struct_size=c.sizeof(native.CCardParams),
        device=native.DEVICES[card.device],
        head=card.head,
        lend_from=card.lend_from,
        budget=card.budget,
        n_layer=len(card.neurons),
        dense=(c.c_uint8 * len(card.dense))(*card.dense),
        n_neurons=(native.u32 * len(card.neurons))(*card.neurons),
    )


def _ids(tokens: Sequence[int]) -> npt.NDArray[np.int32]:
    return np.ascontiguousarray(tokens, np.int32)


def _pointer(ids: npt.NDArray[np.int32]) -> "c._Pointer[c.c_int32]":
    return ids.ctypes.data_as(native.i32_p)


def _float_pointer(array: Logits | None) -> "c._Pointer[c.c_float] | None":
    return array.ctypes.data_as(native.f32_p) if array is not None else None
