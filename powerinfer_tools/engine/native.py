"""The C interface (native/include/powerinfer.h), one to one: the only ctypes in the tree."""

import ctypes as c
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from powerinfer_tools.errors import PowerinferError

ABI_VERSION = 6
LIBRARY = {"linux": "libpowerinfer.so", "darwin": "libpowerinfer.dylib", "win32": "powerinfer.dll"}
KINDS = {
    1: "usage",
    2: "io",
    3: "truncated",
    4: "malformed",
    5: "mismatch",
    6: "unsupported",
    7: "memory",
    8: "internal",
}
KERNELS = {"best": 0, "scalar": 1, "avx2": 2, "avx512": 3}
READERS = {"best": 0, "io_uring": 1, "threads": 2}
DEVICES = {"cuda": 1, "host": 2}
CARD_MEASURES = {"read": 0, "copy": 1, "launch": 2, "merge": 3}
MAX_BOUNDS = 25
MODES = {"auto": 0, "dense": 1, "gate": 2, "predictor": 3}

u32, u64, size_t, f32, f64 = c.c_uint32, c.c_uint64, c.c_size_t, c.c_float, c.c_double
i32_p, f32_p = c.POINTER(c.c_int32), c.POINTER(c.c_float)
handle = c.c_void_p


class CModelInfo(c.Structure):
    _fields_ = [
        ("struct_size", u32),
        *((n, u32) for n in "n_layer n_embd n_ff n_head n_head_kv head_dim n_vocab n_ctx_train".split()),
        *((f"{n}_bytes", u64) for n in "weight resident cache disk card card_context".split()),
    ]


class CDiskParams(c.Structure):
    _fields_ = [
        *((n, u32) for n in "struct_size reader n_slots n_transit n_layer".split()),
        ("n_resident", c.POINTER(u32)),
    ]


class CCardParams(c.Structure):
    _fields_ = [
        *((n, u32) for n in "struct_size device head lend_from".split()),
        ("budget", u64),
        ("n_layer", u32),
        ("dense", c.POINTER(c.c_uint8)),
        ("n_neurons", c.POINTER(u32)),
    ]


class CCardInfo(c.Structure):
    _fields_ = [
        ("struct_size", u32),
        ("name", c.c_char * 128),
        *((f"{n}_bytes", u64) for n in "total free context".split()),
    ]


class CSessionParams(c.Structure):
    _fields_ = [(n, u32) for n in "struct_size n_ctx n_threads mode uncut kernels".split()]


class CStats(c.Structure):
    _fields_ = [
        ("struct_size", u32),
        *((n, u64) for n in "n_decode n_prefill bytes_decode".split()),
        *((n, u64) for n in "neurons_active neurons_computed neurons_total".split()),
        *((f"seconds_{n}", f64) for n in "attention predictor gate updown head other sync".split()),
        *((n, u64) for n in "bytes_attention bytes_predictor bytes_gate bytes_updown bytes_head".split()),
        ("seconds_disk", f64),
        *((n, u64) for n in "neurons_prefix neurons_cache neurons_disk disk_reads disk_bytes stream_bytes".split()),
        *((n, u64) for n in "neurons_ahead neurons_ahead_asked".split()),
        ("seconds_card", f64),
        *((f"card_{n}", u64) for n in "neurons neurons_fired read_bytes transfers waits bytes".split()),
    ]


class CLayerScore(c.Structure):
    _fields_ = [(n, u64) for n in "n_tokens n_true n_predicted n_hit".split()]


class CSampling(c.Structure):
    _fields_ = [
        ("struct_size", u32),
        ("temperature", f32),
        ("top_k", u32),
        ("top_p", f32),
        ("min_p", f32),
        ("repeat_penalty", f32),
        ("repeat_last_n", u32),
    ]


P = c.POINTER
SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "pi_abi_version": (u32, []),
    "pi_last_error": (c.c_char_p, []),
    "pi_kernels": (c.c_char_p, [u32]),
    "pi_check": (c.c_int, [c.c_char_p]),
    "pi_model_open": (c.c_int, [c.c_char_p, P(CDiskParams), P(CCardParams), P(handle)]),
    "pi_model_close": (None, [handle]),
    "pi_model_get_info": (c.c_int, [handle, P(CModelInfo)]),
    "pi_session_open": (c.c_int, [handle, P(CSessionParams), P(handle)]),
    "pi_session_close": (None, [handle]),
    "pi_session_bytes": (c.c_int, [handle, P(u64), P(u64)]),
    "pi_session_card_bytes": (c.c_int, [handle, P(u64), P(u64)]),
    "pi_prefill": (c.c_int, [handle, i32_p, size_t, f32_p]),
    "pi_decode": (c.c_int, [handle, c.c_int32, f32_p]),
    "pi_score": (c.c_int, [handle, i32_p, size_t, f32_p, P(CLayerScore)]),
    "pi_truncate": (c.c_int, [handle, size_t]),
    "pi_position": (c.c_int, [handle, P(size_t)]),
    "pi_seed": (c.c_int, [handle, u64]),
    "pi_sample": (c.c_int, [handle, P(CSampling), i32_p, size_t, i32_p]),
    "pi_session_get_stats": (c.c_int, [handle, P(CStats)]),
    "pi_session_reset_stats": (c.c_int, [handle]),
    "pi_measure_memory": (c.c_int, [u32, u64, u32, P(f64)]),
    "pi_measure_rows": (c.c_int, [u32, u64, u64, u32, u32, P(f64)]),
    "pi_measure_file": (c.c_int, [c.c_int, u32, u32, f64, P(f64)]),
    "pi_chunk_bounds": (c.c_int, [f32_p, u32, P(u32), P(u32)]),
    "pi_card_describe": (c.c_int, [u32, P(CCardInfo)]),
    "pi_measure_card": (c.c_int, [u32, u32, u64, u64, u32, P(f64)]),
}


@cache
def library() -> c.CDLL:
    """The native library with its signatures. Errors: not found (names the places), another ABI version."""
    path = _find()
    try:
        lib = c.CDLL(str(path))
    except OSError as error:
        raise PowerinferError(f"{path}: the native library cannot be loaded: {error}", "internal") from error
    for name, (result, arguments) in SIGNATURES.items():
        try:
            function = getattr(lib, name)
        except AttributeError:
            raise PowerinferError(f"{path}: expected the function {name}, found none: rebuild it", "mismatch") from None
        function.restype, function.argtypes = result, arguments
    if (found := lib.pi_abi_version()) != ABI_VERSION:
        raise PowerinferError(f"{path}: expected ABI version {ABI_VERSION}, found {found}: rebuild it", "mismatch")
    return lib


def _find() -> Path:
    if override := os.environ.get("POWERINFER_LIB"):
        return Path(override)
    import powerinfer_tools

    name = LIBRARY.get(sys.platform, "libpowerinfer.so")
    places = [Path(folder) / name for folder in powerinfer_tools.__path__]
    for place in places:
        if place.is_file():
            return place
    looked = ", ".join(str(place) for place in places)
    raise PowerinferError(f"native library not found: looked for {looked}; build it with `make native`", "internal")


def check(status: int, where: str = "") -> None:
    """Raises the last native error if `status` is one; `where` (a path) goes before the message."""
    if status == 0:
        return
    message = library().pi_last_error().decode("utf-8", "replace")
    raise PowerinferError(f"{where}: {message}" if where else message, KINDS.get(status, "internal"))


def check_artifact(path: Path) -> None:
    """The native reader's verdict on a file's header. Errors: whatever breaks the format's rules."""
    check(library().pi_check(os.fsencode(path)), str(path))


def measure_memory(n_threads: int, buffer_bytes: int, repeats: int = 5) -> float:
    """Bytes per second of plain reads in sequence: the most that memory gives."""
    rate = f64()
    check(library().pi_measure_memory(n_threads, buffer_bytes, repeats, c.byref(rate)))
    return rate.value


def measure_rows(n_threads: int, buffer_bytes: int, row_bytes: int, stride_rows: int = 1, repeats: int = 5) -> float:
    """Bytes per second as the engine reads weights: Q4_0 rows of `row_bytes`, one in `stride_rows`; 1: in sequence."""
    rate = f64()
    check(library().pi_measure_rows(n_threads, buffer_bytes, row_bytes, stride_rows, repeats, c.byref(rate)))
    return rate.value


def measure_file(fd: int, read_bytes: int, n_at_once: int, seconds: float) -> float:
    """Bytes per second of the disk tier's reads of this file, past the page cache where that works."""
    rate = f64()
    check(library().pi_measure_file(fd, read_bytes, n_at_once, seconds, c.byref(rate)))
    return rate.value


def chunk_bounds(frequency: npt.NDArray[np.float32]) -> list[int]:
    """Where a layer's neurons can be divided between processor and card, from 0 to their number; those of experts
    cannot, and are all the processor's."""
    values = np.ascontiguousarray(frequency, np.float32)
    bounds, n = (u32 * MAX_BOUNDS)(), u32()
    check(library().pi_chunk_bounds(values.ctypes.data_as(f32_p), len(values), bounds, c.byref(n)))
    return list(bounds[: n.value])


def describe_card(device: str = "cuda") -> tuple[str, int, int, int]:
    """The card's name, and bytes: its memory, what of it is free, what it takes before anything is stored there."""
    info = CCardInfo(struct_size=c.sizeof(CCardInfo))
    check(library().pi_card_describe(DEVICES[device], c.byref(info)))
    return info.name.decode("utf-8", "replace"), info.total_bytes, info.free_bytes, info.context_bytes


def measure_card(
    what: str, device: str = "cuda", *, buffer_bytes: int = 0, row_bytes: int = 1 << 20, stride_rows: int = 1
) -> float:
    """Of a card: read (bytes per second, as measure_rows), copy (bytes per second to there), launch (seconds of one
    small step behind another), merge (seconds: row_bytes there, one step, as many back)."""
    result = f64()
    arguments = CARD_MEASURES[what], buffer_bytes, row_bytes, stride_rows, c.byref(result)
    check(library().pi_measure_card(DEVICES[device], *arguments))
    return result.value


def kernels(which: int = 0) -> str | None:
    """The name of the kernels that `which` selects on this processor (0 best, 1 scalar, 2 AVX2, 3 AVX-512), or None."""
    name = library().pi_kernels(which)
    return name.decode() if name else None


def describe() -> str:
    """The library's ABI version and the kernels that this processor runs."""
    return f"native ABI {library().pi_abi_version()}, kernels {kernels()}"
