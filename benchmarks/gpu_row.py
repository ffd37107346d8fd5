"""One row of gpu.py: a model under one budget with one number of threads; all plans of it in turn, in one process."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import gpu_plans as plans
from benchmarks.shapes import Shape
from powerinfer_tools.artifact import open_artifact
from powerinfer_tools.engine import Engine, Model, Stats
from powerinfer_tools.engine.native import describe_card
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.placement import Machine, Tier, measure_machine
from powerinfer_tools.placement.card import card_limits, lending
from powerinfer_tools.placement.hottest import hottest_first
from powerinfer_tools.placement.problem import Plan, Problem

Logits = npt.NDArray[np.float32]

OURS, HOTTEST, RANDOM, LAYERS, PROCESSOR = "ours", "hottest first", "random", "whole layers, dense", "processor alone"
WARM_UP, CHECKED = 4, 16  # decoded tokens
HOST_TIMES, HOST_MERGE_S = 10, 1e-7  # of the made-up card: times as fast as memory; one hand-over
SPARE = 1.2  # of the bytes that contenders take: what must be free for all to be loaded at once
TIE = 0.05  # of the standard deviation of a token's logits: closer than that, either of two may be the likeliest


@dataclass(frozen=True)
class Case:
    """What a row is of. share: of the whole model's weights and KV cache on the card, what the budget is beside
    context and scratch; prompt, decode: tokens."""

    shape: Shape
    quant: str
    active: float
    share: float
    threads: int
    device: str
    prompt: int
    decode: int

    @property
    def key(self) -> str:
        shape = f"{self.shape.name}, {self.shape.n_layer} layers, {self.quant}, {self.active:.0%} active"
        return f"{shape}, {self.share:.0%} on the card, {self.threads} threads"

    @property
    def ctx_size(self) -> int:
        return self.prompt + self.decode


@dataclass(frozen=True)
class Contender:
    """One way to run the model. problem: what foretells its time; budget: of the card, 0 where nothing keeps it;
    lend_from: tokens of a prompt that is computed there as a whole."""

    name: str
    mode: str
    plan: Plan
    problem: Problem
    budget: int = 0
    lend_from: int = 0

    def open(self, model: Path, device: str) -> Model:
        if plans.same(self.plan, plans.nothing(self.problem)):
            return Model(model)
        return Model(model, None, card_limits(self.plan, self.budget, device, self.lend_from))


class Models:
    """Each contender's weights: all of them loaded where there is room, else one after the other."""

    def __init__(self, contenders: list[Contender], path: Path, device: str) -> None:
        self.path, self.device, self.loaded = path, device, dict[str, Model]()
        taken = [c.problem.bytes(c.plan)[:2] for c in contenders]
        on_card, in_ram = (SPARE * int(sum(n_bytes)) for n_bytes in zip(*taken, strict=True))
        free = describe_card(device)[2]
        self.all = on_card <= free and in_ram <= free_ram() if free else on_card + in_ram <= free_ram()

    def of(self, contender: Contender) -> Model:
        if contender.name not in self.loaded:
            if not self.all:
                self.loaded.clear()
            self.loaded[contender.name] = contender.open(self.path, self.device)
        return self.loaded[contender.name]


def free_ram() -> int:
    """Bytes that Linux would give."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


@dataclass(frozen=True)
class Run:
    """One run's figures. card_bytes: everything there."""

    ms: float
    prompt_tokens_per_s: float
    stats: Stats
    card_bytes: int


def measure(case: Case, model: Path, rounds: int) -> dict[str, Any]:
    """The row: every contender's figures, one a round, and what they depend on."""
    machine = measured(case)
    contenders = all_contenders(case, model, machine)
    models = Models(contenders, model, case.device)
    agreements = compare(case, contenders, models)
    runs = in_turn(contenders, rounds, lambda c: run(models.of(c), c.mode, case))
    return {
        "machine": machine.to_json(),
        "vram": contenders[0].budget,
        "lend_from": contenders[0].lend_from,
        "contenders": {c.name: figures(c, runs[c.name]) | {"agreement": agreements[c.name]} for c in contenders},
    }


def in_turn(contenders: list[Contender], rounds: int, once: Callable[[Contender], Run]) -> dict[str, list[Run]]:
    """All contenders one after the other, and that again each round, so that the machine's drift meets all alike."""
    runs: dict[str, list[Run]] = {c.name: [] for c in contenders}
    for _ in range(rounds):
        for c in contenders:
            runs[c.name].append(once(c))
    return runs


def measured(case: Case) -> Machine:
    """The machine with so many threads, and its card; for the host device one is made up, so that plans use it."""
    machine = measure_machine(case.threads)
    if machine.vram is None:
        raise PowerinferError("; ".join(machine.notes), "unsupported")
    if case.device == "host":
        rows = tuple((size, HOST_TIMES * speed) for size, speed in machine.ram.rows)
        return replace(machine, vram=Tier(0, HOST_TIMES * machine.ram.sequential, rows, HOST_MERGE_S))
    return machine


def all_contenders(case: Case, model: Path, machine: Machine) -> list[Contender]:
    """Ours first, and those whose plan is not ours by another way; prompts are lent as the loader would."""
    how = case.shape, case.quant, case.active, machine, case.ctx_size
    unlent = plans.sparse_problem(*how)
    room = plans.budget(unlent, case.share) - unlent.costs.card_fixed
    lend_from = lending(open_artifact(model), machine, room, case.threads)
    sparse = plans.sparse_problem(*how, lends=lend_from > 0)
    dense = plans.dense_problem(case.shape, case.quant, machine, case.ctx_size, lends=lend_from > 0)
    budget = plans.budget(sparse, case.share)
    contenders = [
        Contender(OURS, "auto", plans.found(sparse, budget), sparse, budget, lend_from),
        Contender(HOTTEST, "auto", hottest_first(sparse, budget), sparse, budget, lend_from),
        Contender(RANDOM, "auto", plans.drawn(sparse, budget), sparse, budget, lend_from),
        Contender(LAYERS, "dense", plans.whole_layers(dense, budget), dense, 0, lend_from),
        Contender(PROCESSOR, "auto", plans.nothing(sparse), sparse),
    ]
    return [c for c in contenders if c.name not in (HOTTEST, RANDOM) or not plans.same(c.plan, contenders[0].plan)]


def run(model: Model, mode: str, case: Case) -> Run:
    """A prompt and tokens after it, drawn beforehand: the same work for every contender."""
    prompt, tokens = ids(case, model)
    with Engine(model, ctx_size=case.ctx_size, threads=case.threads, mode=mode) as engine:
        engine.prefill(prompt[:8])
        seconds(lambda: [engine.decode(token) for token in tokens[:WARM_UP]])
        engine.truncate(0)
        prefill_s = seconds(lambda: engine.prefill(prompt))
        engine.reset_stats()
        decode_s = seconds(lambda: [engine.decode(token) for token in tokens])
        return Run(decode_s / len(tokens) * 1e3, len(prompt) / prefill_s, engine.stats(), on_card(engine))


def on_card(engine: Engine) -> int:
    """All bytes there, as the engine counts them."""
    info = engine.model.info
    return info.card_bytes + info.card_context_bytes + sum(engine.card_memory())


def ids(case: Case, model: Model) -> tuple[list[int], list[int]]:
    """(prompt, tokens that are decoded after it)"""
    drawn = np.random.default_rng(0).integers(0, model.info.n_vocab, case.ctx_size).tolist()
    return drawn[: case.prompt], drawn[case.prompt :]


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(case: Case, contenders: list[Contender], models: Models) -> dict[str, dict[str, Any] | None]:
    """Each contender's logits beside those of the processor alone in the same mode; None for that one itself."""
    alone = next(c for c in contenders if c.name == PROCESSOR)
    expected = {mode: logits(models.of(alone), mode, case) for mode in sorted({c.mode for c in contenders})}
    agreements: dict[str, dict[str, Any] | None] = {PROCESSOR: None}
    for c in contenders:
        if c is not alone:
            agreements[c.name] = agreement_of(logits(models.of(c), c.mode, case), expected[c.mode])
    return agreements


def logits(model: Model, mode: str, case: Case) -> Logits:
    """[CHECKED, n_vocab], of tokens after the prompt."""
    prompt, tokens = ids(case, model)
    with Engine(model, ctx_size=case.ctx_size, threads=case.threads, mode=mode) as engine:
        engine.prefill(prompt)
        return np.array([engine.decode(token, logits=True) for token in tokens[:CHECKED]])


def agreement_of(found: Logits, expected: Logits) -> dict[str, Any]:
    """nmse; equal: bit for bit; same_tokens: of positions, the share with the same likeliest token; far_tokens: of the
    others, how many differ by more than TIE."""
    chosen, best = found.argmax(-1), expected.argmax(-1)
    each = np.arange(len(expected))
    behind = (expected[each, best] - expected[each, chosen]) / expected.std(-1)
    return {
        "nmse": float(((found - expected) ** 2).sum(dtype=np.float64) / (expected**2).sum(dtype=np.float64)),
        "equal": bool(np.array_equal(found, expected)),
        "same_tokens": float((chosen == best).mean()),
        "far_tokens": int((behind > TIE).sum()),
    }


def figures(contender: Contender, runs: list[Run]) -> dict[str, Any]:
    """A contender's part of the row; counters are of its first run, as they are the same in every one."""
    plan, stats = contender.plan, runs[0].stats
    n = stats.n_decode
    return {
        "mode": contender.mode,
        "ms": [run.ms for run in runs],
        "prompt_tokens_per_s": [run.prompt_tokens_per_s for run in runs],
        "predicted_ms": float(contender.problem.seconds(plan)) * 1e3,
        "plan": {"head": bool(plan.head), "dense": plan.dense.tolist(), "neurons": plan.vram.tolist()},
        "card_bytes": max(run.card_bytes for run in runs),
        "active": stats.active_ratio,
        "hits_card": stats.card_neurons_fired / max(1, stats.neurons_active),
        "transfers": stats.card_transfers / n,
        "waits": stats.card_waits / n,
        "crossed_bytes": stats.card_bytes / n,
        "wait_ms": statistics.median(run.stats.seconds_card for run in runs) / n * 1e3,
        "read_bytes": {"card": stats.card_read_bytes / n, "ram": stats.bytes_decode / n},
    }
