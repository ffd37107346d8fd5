"""How fast an artifact runs here, where the time goes, and what share of the memory's ceiling that is."""

import hashlib
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from powerinfer_tools.artifact import Artifact, open_artifact
from powerinfer_tools.artifact.layout import MODE_GATE, LayerPlan
from powerinfer_tools.engine import DiskLimits, Engine, Sampling, Stats
from powerinfer_tools.engine.engine import default_threads
from powerinfer_tools.engine.native import KERNELS, measure_memory
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.placement.card import CardPlan, artifact_problem
from powerinfer_tools.placement.limits import Budget, Opened, disk_costs, open_within
from powerinfer_tools.placement.machine import Machine, Tier
from powerinfer_tools.placement.measure import BUFFER_BYTES, measure_file, measure_ram
from powerinfer_tools.placement.problem import Plan
from powerinfer_tools.progress import Progress, default_progress
from powerinfer_tools.tokens import Tokenizer

PROMPT = (
    "The harbour town had two clocks, and they never agreed. The one on the church was wound every Sunday by the "
    "sexton; the other, above the customs house, by whoever remembered. A visitor once asked which of them was right. "
    "Both, said the innkeeper, but not at the same time. Please explain what he meant, and how one would find out. "
)
CEILING_BYTES = 1 << 30  # read to measure the ceiling: far beyond any cache


@dataclass(frozen=True)
class Timed:
    """Seconds of a prompt, seconds of each decoded token, the ids, and the engine's counters of decoding."""

    prefill_s: float
    decode_s: list[float]
    ids: list[int]
    stats: Stats


def bench(
    path: Path,
    *,
    mode: str = "auto",
    prompt_tokens: int = 128,
    n_tokens: int = 64,
    repeats: int = 3,
    threads: int | None = None,
    ram: int | None = None,
    vram: int = 0,
    kernels: str = "best",
    text: str = PROMPT,
    machine: Machine | None = None,
    say: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The document of `bench --json`: medians over `repeats` runs of the same tokens (drawn with one seed).

    The prompt is `text`, repeated to prompt_tokens; decoding continues it at temperature 0.8. bytes_per_token counts
    weights and KV cache that decoding read in memory; ceiling_gb_s is a plain sequential read with as many threads.
    kernels: best, scalar, avx2 or avx512. ram: bytes to stay within: "disk" says what that cost, "tiers" where neurons
    were; first_token_s is then from the start of loading, past the page cache, to the first token of the prompt.
    vram: bytes of a card to stay within: "card" says what was read there and what crossed, against its own ceiling;
    machine: what to plan for, else this one.
    """
    artifact = open_artifact(path)
    if prompt_tokens + n_tokens > artifact.config.n_ctx:
        raise PowerinferError(
            f"--prompt-tokens and --decode-tokens: expected at most the model's {artifact.config.n_ctx} together, "
            f"found {prompt_tokens + n_tokens}",
            "usage",
        )
    ids = _prompt(artifact, text, prompt_tokens)
    ctx_size, threads = len(ids) + n_tokens, threads or default_threads()
    here = None
    if ram is not None:  # now, as memory is free: beside the weights there may be no room for what is read
        here = _measure(threads, measure_file(path), min(CEILING_BYTES, ram // 4))
    start = time.perf_counter()
    how: dict[str, Any] = {"ctx_size": ctx_size, "threads": threads}
    opened = open_within(artifact, ram, vram, dense=mode == "dense", machine=machine, say=say, **how)
    runs: list[Timed] = []
    with default_progress(progress) as report:
        for i in range(repeats):
            with Engine(opened.model, mode=mode, kernels=KERNELS[kernels], **how) as engine:
                if i == 0:
                    first_token_s = _first_token(engine, ids) - start
                runs.append(_run(engine, ids, n_tokens))
                card_memory = engine.card_memory()
            report("bench, runs", i + 1, repeats)
    peak = peak_rss_bytes()  # before memory is measured, which takes a large buffer
    here = here or _measure(threads, None, CEILING_BYTES)
    return {
        **_document(artifact, mode, *here, len(ids), runs, opened),
        "card": _card(opened, card_memory, runs) if opened.card is not None else None,
        "peak_rss_bytes": peak,
        "first_token_s": first_token_s,
    }


def _prompt(artifact: Artifact, text: str, n: int) -> list[int]:
    ids = Tokenizer(artifact.tokenizer_json, artifact.special).encode(text, add_bos=False, parse_special=False)
    if not ids:
        raise PowerinferError("the prompt is empty: expected at least one token", "usage")
    return [ids[i % len(ids)] for i in range(n)]


def _first_token(engine: Engine, prompt: list[int]) -> float:
    """When the token after the prompt was there; the context is empty again."""
    engine.prefill(prompt)
    engine.sample(Sampling())
    there = time.perf_counter()
    engine.truncate(0)
    return there


def _run(engine: Engine, prompt: list[int], n_tokens: int) -> Timed:
    """One run; the first tokens of a session warm it up and are not timed."""
    engine.prefill(prompt[:8])
    engine.decode(prompt[0])
    engine.truncate(0)
    engine.seed(0)
    start = time.perf_counter()
    engine.prefill(prompt)
    prefill_s = time.perf_counter() - start
    engine.reset_stats()
    ids: list[int] = []
    seconds: list[float] = []
    for _ in range(n_tokens):
        start = time.perf_counter()
        ids.append(engine.sample(Sampling()))
        engine.decode(ids[-1])
        seconds.append(time.perf_counter() - start)
    return Timed(prefill_s, seconds, ids, engine.stats())


def _measure(threads: int, disk: Tier | None, n_bytes: int) -> tuple[Machine, float]:
    """What foretells the time; and bytes per second of plain reads, the ceiling."""
    ram = measure_ram(threads, min(n_bytes, BUFFER_BYTES))
    return Machine("this machine", threads, ram, disk=disk), measure_memory(threads, n_bytes)


def _document(
    artifact: Artifact,
    mode: str,
    machine: Machine,
    ceiling: float,
    n_prompt: int,
    runs: list[Timed],
    opened: Opened,
) -> dict[str, Any]:
    stats = runs[0].stats
    decode_s = statistics.median(sum(run.decode_s) for run in runs)
    per_token = np.sort(np.concatenate([run.decode_s for run in runs])) * 1e3
    prefill_s = statistics.median(run.prefill_s for run in runs)
    n = len(runs[0].ids)
    bytes_per_token = stats.bytes_decode / n
    budget, card = opened.ram, opened.card
    limits, dense = budget.limits if budget is not None else None, mode == "dense"
    return {
        "model": artifact.config.name,
        "quant": artifact.quant,
        "mode": mode,
        "threads": machine.threads,
        "runs": len(runs),
        "prefill": {"tokens": n_prompt, "tokens_per_s": n_prompt / prefill_s},
        "decode": {
            "tokens": n,
            "tokens_per_s": n / decode_s,
            "ms_per_token": {f"p{q}": float(np.percentile(per_token, q)) for q in (50, 90, 99)},
        },
        "bytes_per_token": bytes_per_token,
        "ceiling_gb_s": ceiling / 1e9,
        "ceiling_share": bytes_per_token * n / decode_s / ceiling,
        "active_ratio": stats.active_ratio,
        "predicted_ms_per_token": predicted_seconds(artifact, machine, n_prompt + n, limits, card, dense) * 1e3
        if mode == "auto" or (dense and limits is None)
        else None,
        "tiers": _tiers(artifact, limits, opened, stats),
        "disk": _disk(artifact, budget, runs) if budget is not None else None,
        "breakdown": breakdown(runs),
        "output_hash": hashlib.sha256(np.asarray(runs[0].ids, "<i4").tobytes()).hexdigest()[:16],
    }


def _tiers(artifact: Artifact, limits: DiskLimits | None, opened: Opened, stats: Stats) -> list[dict[str, Any]]:
    """Where neurons lie, bytes of their bundles, and where decoding found those that it asked for; on a card, those
    that fired."""
    config, size = artifact.config, disk_costs(artifact).bundles[0][1]
    card, n_all, n_card = opened.card, config.n_layer * config.n_ff, 0
    rows: list[tuple[str, int, int, float]] = []  # name, bytes, neurons, share of hits
    left = 1.0
    if card is not None:
        n_card, on_card = int(card.plan.vram.sum()), stats.card_neurons_fired / max(1, stats.neurons_active)
        rows, left = [("vram", n_card * size, n_card, on_card)], 1.0 - on_card
    if limits is None:
        rows.append(("ram", (n_all - n_card) * size, n_all - n_card, left))
    else:
        prefix = sum(limits.resident)
        cached = sum(min(limits.slots, config.n_ff - k) for k in limits.resident)
        asked = max(1, stats.neurons_prefix + stats.neurons_cache + stats.neurons_disk)
        rows += [
            ("prefix", (prefix - n_card) * size, prefix - n_card, left * stats.neurons_prefix / asked),
            ("cache", cached * size, cached, left * stats.neurons_cache / asked),
            ("disk", (n_all - prefix) * size, n_all - prefix, left * stats.neurons_disk / asked),
        ]
    return [
        {"name": name, "bytes": n_bytes, "neurons_share": n / n_all, "hits_share": hits}
        for name, n_bytes, n, hits in rows
    ]


def _card(opened: Opened, memory: tuple[int, int], runs: list[Timed]) -> dict[str, Any]:
    """What lies on the card by the engine's count, and what crossed: counters of the first run, the wait of the median
    one."""
    assert opened.card is not None
    card, info, stats, n = opened.card, opened.model.info, runs[0].stats, len(runs[0].ids)
    kv, scratch = memory
    decode_s = statistics.median(sum(run.decode_s) for run in runs)
    ceiling = card.problem.vram.sequential
    used = {"context": info.card_context_bytes, "weights": info.card_bytes, "kv": kv, "scratch": scratch}
    return {
        "name": card.problem.machine.card,
        "budget": {"vram": card.vram, "planned": card.n_bytes, **used, "total": sum(used.values())},
        "dense_blocks": int(card.plan.dense.sum()),
        "head": bool(card.plan.head),
        "read_bytes_per_token": stats.card_read_bytes / n,
        "ceiling_gb_s": ceiling / 1e9,
        "ceiling_share": stats.card_read_bytes / decode_s / ceiling,
        "transfers_per_token": stats.card_transfers / n,
        "waits_per_token": stats.card_waits / n,
        "crossed_bytes_per_token": stats.card_bytes / n,
        "wait_ms_per_token": statistics.median(run.stats.seconds_card for run in runs) / n * 1e3,
    }


def _disk(artifact: Artifact, budget: Budget, runs: list[Timed]) -> dict[str, Any]:
    """What staying within a budget cost: counters of the first run, the wait of the median one."""
    stats, n = runs[0].stats, len(runs[0].ids)
    useful = stats.neurons_disk * disk_costs(artifact).bundles[0][1]
    counted = "ram process weights contexts cache beside total".split()
    return {
        "budget": {name: getattr(budget, name) for name in counted},
        "bytes_per_token": stats.disk_bytes / n,
        "reads_per_token": stats.disk_reads / n,
        "padding_share": 1 - useful / stats.disk_bytes if stats.disk_bytes else 0.0,
        "stream_bytes_per_token": stats.stream_bytes / n,
        "ahead_per_token": stats.neurons_ahead / n,
        "ahead_precision": stats.neurons_ahead_asked / max(1, stats.neurons_ahead),
        "ahead_recall": stats.neurons_ahead_asked / max(1, stats.neurons_disk),
        "wait_ms_per_token": statistics.median(run.stats.seconds_disk for run in runs) / n * 1e3,
    }


def breakdown(runs: list[Timed]) -> list[dict[str, Any]]:
    """Milliseconds and bytes a token of each part of decoding, of the median run: they sum to its whole."""
    run = sorted(runs, key=lambda r: sum(r.decode_s))[len(runs) // 2]
    n, stats = len(run.ids), run.stats
    parts = {
        "attention": (stats.seconds_attention, stats.bytes_attention),
        "predictor": (stats.seconds_predictor, stats.bytes_predictor),
        "gate": (stats.seconds_gate, stats.bytes_gate),
        "up and down": (stats.seconds_updown, stats.bytes_updown),
        "output head": (stats.seconds_head, stats.bytes_head),
        "waiting for the disk": (stats.seconds_disk, 0),
        "waiting for the card": (stats.seconds_card, 0),
        "synchronisation": (stats.seconds_sync, 0),
        "norms and other serial work": (stats.seconds_other, 0),
    }
    rest = sum(run.decode_s) - sum(seconds for seconds, _ in parts.values())
    rows = [*((name, *values) for name, values in parts.items()), ("sampling, calls", rest, 0)]
    return [{"part": name, "ms": seconds / n * 1e3, "bytes": size / n} for name, seconds, size in rows]


def predicted_seconds(
    artifact: Artifact,
    machine: Machine,
    ctx_size: int,
    limits: DiskLimits | None = None,
    card: CardPlan | None = None,
    dense: bool = False,
) -> float:
    """What placement's model expects of a token, from the frequencies of the calibration: the cache holds the hottest
    neurons that follow the resident ones. dense: all neurons are read, and no predictors."""
    n_layer, n_ff = artifact.config.n_layer, artifact.config.n_ff
    if dense:
        artifact = replace(artifact, plans=[LayerPlan(MODE_GATE)] * n_layer)
    plan = Plan.in_ram(n_layer, n_ff)
    if card is not None:
        plan, machine = replace(card.plan, ram=plan.ram), replace(machine, vram=card.problem.machine.vram)
    if limits is not None:
        plan = replace(plan, ram=np.minimum(n_ff, np.array(limits.resident) + limits.slots))
    return float(artifact_problem(artifact, machine, ctx_size=ctx_size, dense=dense).seconds(plan))


def peak_rss_bytes() -> int:
    """The most memory that this process held. On Linux from VmHWM: ru_maxrss counts the parent, too."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
