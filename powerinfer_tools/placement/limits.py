"""What lies on a card within --vram, and stays in memory within --ram; solved anew at each load, in under a second.

The search of `place` says what goes to the card. Of what is left, counted are this process as it is, weights, KV cache
and scratch of every context, and the disk tier's own memory. What then remains goes to neurons: the hottest of all
layers stay, and a cache holds what the text at hand asks for.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from powerinfer_tools.artifact.read import Artifact
from powerinfer_tools.engine.engine import DiskLimits, Model, default_ctx, default_threads
from powerinfer_tools.errors import Infeasible
from powerinfer_tools.placement.card import CardPlan, check_structure, plan_card
from powerinfer_tools.placement.costs import (
    BESIDE,
    BUNDLE,
    PAGE,
    PREDICTOR,
    TABLE,
    DiskCosts,
    disk_scratch_bytes,
    is_head,
    kv_bytes,
    mailbox_bytes,
    scratch_bytes,
)
from powerinfer_tools.placement.machine import Machine
from powerinfer_tools.placement.measure import cached_machine
from powerinfer_tools.placement.problem import Plan

TRIES = 8  # of budgets, until one does
MUST_STAY = (
    "attention, KV cache, scratch, what chooses neurons and one layer's neurons cannot stay on disk; "
    "a shorter --ctx-size needs less"
)
SLACK = 12 << 20  # bytes: page tables, and what Python and its libraries still take
CACHE_SHARE = 0.4  # of the memory for neurons, where more than that is left on disk: measured in benchmarks/LOG.md
HEADROOM, MARGIN = 1.5, 64  # neurons in transit: times what is expected, and more
READ_EQUALS = 32 << 10  # bytes that a disk reads in sequence in the time that one more read takes


@dataclass(frozen=True)
class Budget:
    """A budget as it is spent, in bytes. limits: None where everything fits; contexts: KV cache and scratch."""

    ram: int
    process: int
    weights: int
    contexts: int
    cache: int
    beside: int
    limits: DiskLimits | None

    @property
    def total(self) -> int:
        return self.process + self.weights + self.contexts + self.cache + self.beside


@dataclass(frozen=True)
class Opened:
    """A model, and how it keeps to its budgets; None where there is none, or where nothing lies on a card."""

    model: Model
    ram: Budget | None
    card: CardPlan | None


def open_within(
    artifact: Artifact,
    ram: int | None = None,
    vram: int = 0,
    *,
    ctx_size: int | None = None,
    threads: int | None = None,
    contexts: int = 1,
    dense: bool = False,
    machine: Machine | None = None,
    say: Callable[[str], None] | None = None,
) -> Opened:
    """The model, within `ram` bytes of memory and `vram` of a card, together with so many contexts.

    ram None: as much as it needs; vram 0: no card is touched. dense: all neurons will be computed; machine: what to
    plan for, else this one.
    """
    ctx_size, threads = ctx_size or default_ctx(artifact.config.n_ctx), threads or default_threads()
    how: dict[str, Any] = {"ctx_size": ctx_size, "threads": threads, "contexts": contexts}
    budget = card = None
    if vram:
        check_structure(artifact.config)
    if vram and ram is not None:
        budget, card = _within_both(artifact, ram, vram, how, dense, machine, say)
    elif vram:
        card = plan_card(artifact, vram, None, dense=dense, machine=machine, say=say, **how)
    elif ram is not None:
        budget = fit(artifact, ram, **how)
    if ram is not None:
        _forget_cached(artifact.path)
    limits = None if budget is None else budget.limits
    return Opened(Model(artifact.path, limits, card.limits if card is not None else None), budget, card)


def _within_both(
    artifact: Artifact,
    ram: int,
    vram: int,
    how: dict[str, Any],
    dense: bool,
    machine: Machine | None,
    say: Callable[[str], None] | None,
) -> tuple[Budget, CardPlan | None]:
    """Planned twice: what a search leaves in memory the first time, tens of MiB, is counted the second time.

    Errors: too little memory, naming how much was seen to do.
    """

    def plan(ram: int, say: Callable[[str], None] | None = None) -> tuple[Budget, CardPlan | None]:
        process = process_bytes()
        apart = _apart(artifact, ram, process, **how)
        card = plan_card(artifact, vram, ram, apart, dense=dense, machine=machine, say=say, **how)
        return fit(artifact, ram, process=process, card=card, **how), card

    if machine is None:
        cached_machine(None, how["threads"], say, card=True, apart=True)  # what is measured is said, once
    with suppress(Infeasible):
        plan(ram)
    try:
        return plan(ram, say)
    except Infeasible as error:
        least = _does(plan, error.least)
        text = (
            f"--ram: expected at least {least} bytes ({least >> 20} MiB) beside --vram {vram}, found {ram}: {MUST_STAY}"
        )
        raise Infeasible(text, least) from error


def _does(plan: Callable[[int], object], ram: int) -> int:
    """Memory, from `ram` on, with which there is a plan: in whole MiB and one more, as processes differ a little."""
    for _ in range(TRIES):
        ram = (ram >> 20) + 2 << 20
        try:
            plan(ram)
        except Infeasible as error:
            ram = max(ram, error.least)
        else:
            break
    return ram


def _apart(artifact: Artifact, ram: int, process: int, *, ctx_size: int, threads: int, contexts: int) -> int:
    """Memory that a model with a card takes beside weights, KV caches and scratch: the process, padding of pages, what
    crosses; where the model is larger than `ram` the least of a disk tier, too."""
    config, plans, disk = artifact.config, artifact.plans, disk_costs(artifact)
    apart = process + disk.whole - artifact.tensor_bytes + contexts * mailbox_bytes(config, plans, ctx_size)
    if apart + artifact.tensor_bytes + contexts * session_bytes(artifact, ctx_size, threads) > ram:
        none = [0] * config.n_layer
        apart += _Solver(artifact, disk, CACHE_SHARE, none).least() - disk.weights(none)
        apart += contexts * disk_scratch_bytes(config, plans, threads)
    return apart


def _forget_cached(path: Path) -> None:
    """Drops what the page cache holds of a file: its header was read before, and counts as memory."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def process_bytes() -> int:
    """What this process holds now, and SLACK."""
    status = Path("/proc/self/statm")
    pages = int(status.read_text().split()[1]) if status.exists() else 0
    return pages * PAGE + SLACK


def fit(
    artifact: Artifact,
    ram: int,
    *,
    ctx_size: int,
    threads: int,
    contexts: int = 1,
    process: int | None = None,
    cache_share: float = CACHE_SHARE,
    reader: str = "best",
    card: CardPlan | None = None,
) -> Budget:
    """How an artifact runs within `ram` bytes, `contexts` of them at once. card: what lies there does not lie here.

    Errors: a budget that cannot do.
    """
    config = artifact.config
    first, moved = [0] * config.n_layer, 0
    beside = contexts * session_bytes(artifact, ctx_size, threads, card)
    if card is not None:
        first, moved = card.plan.vram.tolist(), moved_bytes(artifact, card.plan)
    process = process_bytes() if process is None else process
    disk = disk_costs(artifact)
    whole = Budget(ram, process, disk.whole - moved, beside, 0, 0, None)
    if whole.total <= ram:
        return whole
    beside += contexts * disk_scratch_bytes(config, artifact.plans, threads)
    solver = _Solver(artifact, disk, cache_share, first)
    limits = solver.solve(ram - process - beside + moved)
    if limits is None:
        least = process + beside + solver.least() - moved
        raise Infeasible(
            f"--ram: expected at least {least} bytes ({least / 2**20:.1f} MiB), found {ram}: {MUST_STAY}", least
        )
    held = limits.resident, limits.slots, limits.transit
    return Budget(
        ram,
        process,
        disk.weights(limits.resident) - moved,
        beside,
        disk.cache(*held),
        disk.beside(*held),
        replace(limits, reader=reader),
    )


def session_bytes(artifact: Artifact, ctx_size: int, threads: int, card: CardPlan | None = None) -> int:
    """Memory of one context: KV cache of the blocks that are here, scratch, and what crosses to a card."""
    config, plans = artifact.config, artifact.plans
    blocks = config.n_layer if card is None else int(np.count_nonzero(~card.plan.dense))
    mailbox = 0 if card is None else mailbox_bytes(config, plans, ctx_size, card.limits.lend_from > 0)
    return kv_bytes(config, blocks, ctx_size) + scratch_bytes(config, plans, ctx_size, threads) + mailbox


def moved_bytes(artifact: Artifact, plan: Plan) -> int:
    """Memory that a card spares: of each tensor that lies there the whole pages, of neurons' tensors the first."""
    config, total = artifact.config, 0
    for name, tensor in artifact.file.tensors.items():
        if name.startswith("blk."):
            _, number, part = name.split(".", 2)
            i = int(number)
            moved = tensor.n_bytes * int(plan.dense[i])
            if part in (BUNDLE, *BESIDE):
                moved = tensor.n_bytes // config.n_ff * int(plan.vram[i])
            elif part in PREDICTOR:
                always = artifact.always[i]
                moved = tensor.n_bytes // (config.n_ff - always) * max(0, int(plan.vram[i]) - always)
            elif part in TABLE:
                moved = 0
        else:
            moved = tensor.n_bytes * int(plan.head and is_head(config, name))
        total += moved // PAGE * PAGE
    return total


def disk_costs(artifact: Artifact) -> DiskCosts:
    """The artifact's file as the disk tier sees it."""
    config, file = artifact.config, artifact.file
    tensors = [file.tensors[f"blk.{i}.{BUNDLE}"] for i in range(config.n_layer)]
    bundles = tuple((tensor.offset, tensor.n_bytes // config.n_ff) for tensor in tensors)
    table = None
    if not config.tied:
        embedding = file.tensors["token_embd.weight"]
        table = (embedding.offset, embedding.n_bytes, embedding.n_bytes // config.n_vocab)
    return DiskCosts(file.data_offset, file.n_bytes, config.n_ff, bundles, table)


class _Solver:
    def __init__(self, artifact: Artifact, disk: DiskCosts, cache_share: float, first: Sequence[int]) -> None:
        """first: neurons of each layer that lie elsewhere."""
        self.disk, self.n_ff, self.cache_share = disk, artifact.config.n_ff, cache_share
        self.sizes = np.array([size for _, size in disk.bundles])
        self.asked = np.stack([artifact.frequency(i) for i in range(artifact.config.n_layer)]).astype(np.float64)
        for i, always in enumerate(artifact.always):
            self.asked[i, :always] = np.maximum(self.asked[i, :always], artifact.config.taking_part)
        value = self.asked * ((self.sizes + READ_EQUALS) / self.sizes)[:, None]  # time that a byte spares the disk
        self.first = np.array(first)
        order = np.argsort(-value, axis=None, kind="stable")
        self.layers = (order // self.n_ff)[order % self.n_ff >= self.first[order // self.n_ff]]
        self.bytes = np.append(0, np.cumsum(self.sizes[self.layers]))

    def solve(self, room: int) -> DiskLimits | None:
        """The longest prefixes with which everything fits into `room` bytes, beside a cache of its share."""
        low, high, found = 0, room, None
        for _ in range(40):
            middle = (low + high) // 2
            limits = self._limits(middle, room)
            if limits is None:
                high = middle
            else:
                low, found = middle, limits
        return found or self._limits(0, room)

    def least(self) -> int:
        """The smallest room with which there is an answer."""
        resident = self.first.tolist()
        return self.disk.total(resident, 0, self._transit(resident))

    def _limits(self, prefix_bytes: int, room: int) -> DiskLimits | None:
        """Prefixes of so many bytes, and a cache of what they leave; None where it is less than its share."""
        resident = self._hottest(prefix_bytes)
        transit = self._transit(resident)
        fixed = self.disk.total(resident, 0, transit) - self.disk.cache(resident, 0, transit)
        cache = room - fixed
        share = self.cache_share * (cache + prefix_bytes)
        left = int(self.bytes[-1]) - cache - prefix_bytes  # on disk only: what a cache could exchange for what it holds
        if cache < max(self.disk.cache(resident, 0, transit), min(share, left)):
            return None
        low, high = 0, self.n_ff
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.disk.total(resident, middle, transit) <= room
            low, high = (middle, high) if fits else (low, middle - 1)
        return DiskLimits(tuple(resident), low, transit)

    def _hottest(self, n_bytes: int) -> list[int]:
        """Neurons of each layer: of all layers those that spare the disk most."""
        n = int(np.searchsorted(self.bytes, n_bytes, side="right")) - 1
        return [int(k) for k in self.first + np.bincount(self.layers[:n], minlength=len(self.sizes))]

    def _transit(self, resident: Sequence[int]) -> int:
        """Neurons that a layer may read for one token."""
        expected = max(float(row[k:].sum()) for row, k in zip(self.asked, resident, strict=True))
        return min(int(HEADROOM * expected) + MARGIN, self.n_ff - min(resident))


def expected_reads(artifact: Artifact, resident: npt.ArrayLike) -> float:
    """Neurons on disk that a token asks for, by the calibration text."""
    return float(sum(artifact.frequency(i)[k:].sum(dtype=np.float64) for i, k in enumerate(np.asarray(resident))))
