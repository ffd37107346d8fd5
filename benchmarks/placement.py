"""The placement program at the shape of OPT-175B: seconds, objective, proven bound and gap; the naive form beside it.

    python benchmarks/placement.py            both; under a minute
    python benchmarks/placement.py --check    fails unless every row takes under 2 s and is within 0.1 % of its bound

Frequencies are drawn (log-normal, another mean and skew a layer, 6 % active on average); bandwidths are those of the
paper's PC-High (RTX 4090 1008 GB/s, DDR5 67.2 GB/s) with picked rows at 70-90 % of that and a fast NVMe disk. Seconds
are wall time of everything: cumulating frequencies, building the program, solving it, the bound, the last neurons.
"""

import argparse
import sys
import time

import numpy as np
import numpy.typing as npt
import pulp

from powerinfer_tools.artifact.layout import MODE_GATE, MODE_PREDICTOR, LayerPlan
from powerinfer_tools.checkpoint.config import Config
from powerinfer_tools.placement import Machine, Tier, artifact_costs, place
from powerinfer_tools.placement.problem import Problem
from powerinfer_tools.placement.program import solve

GIB = 1 << 30
PC_HIGH = Machine(
    name="i9-13900K, RTX 4090",
    threads=8,
    ram=Tier(192 * GIB, 67.2e9, ((4096, 47e9), (16384, 60e9))),
    vram=Tier(80 * GIB, 1008e9, ((4096, 700e9), (16384, 900e9)), 15e-6),
    disk=Tier(0, 7e9, ((4096, 1.5e9), (65536, 5e9)), 100e-6),
)
ROWS = (
    ("time", 24, None),
    ("time", 24, 64),
    ("time", 0, 64),
    ("time", 80, None),
    ("impact", 24, None),
    ("impact", 24, 64),
)
CHOICES = dict(quant="q4_0", biases=frozenset[str](), ctx_size=2048)


class Drawn:
    """Firing frequencies of a power law, as activations offer them."""

    digest = "drawn"

    def __init__(self, n_layer: int, n_ff: int, seed: int = 0) -> None:
        self.n_layer, self.n_ff = n_layer, n_ff
        draw = np.random.default_rng(seed)
        means = -4.5 + np.arange(n_layer) / n_layer
        self.drawn = [np.clip(draw.lognormal(mean, draw.uniform(1.0, 2.2), n_ff), 0, 1) for mean in means]

    def frequency(self, i: int, /) -> npt.NDArray[np.float64]:
        return self.drawn[i]


def opt(n_layer: int, n_embd: int, n_ff: int) -> Config:
    """An OPT of this shape; OPT-175B: 96, 12288, 49152."""
    sizes = (n_layer, n_embd, n_ff, n_embd // 128, n_embd // 128, 128, 50272, 2048)
    return Config("opt", f"opt-{n_layer}x{n_ff}", *sizes, 1e-5, "relu", False, True, None, (0.0,) * n_layer)


def large() -> bool:
    """Prints a row for each budget at the shape of OPT-175B; true if all are fast and proven."""
    config, firing = opt(96, 12288, 49152), Drawn(96, 49152)
    plans = [LayerPlan(MODE_PREDICTOR, rank=1024)] * 96
    costs = artifact_costs(config, plans, threads=PC_HIGH.threads, **CHOICES)
    active = np.mean([firing.frequency(i).mean() for i in range(96)])
    print(f"OPT-175B: {costs.weights / 1e9:.1f} GB, KV cache {costs.kv / 1e9:.1f} GB, {active:.1%} active on average")
    print(
        "objective  vram GiB  ram GiB  seconds        value        bound      gap  blocks in vram  hits vram/ram/disk"
    )
    good = True
    for objective, vram, ram in ROWS:
        start = time.perf_counter()
        found = place(
            config,
            firing,
            plans,
            machine=PC_HIGH,
            vram=vram * GIB,
            ram=None if ram is None else ram * GIB,
            objective=objective,
            **CHOICES,
        )
        seconds = time.perf_counter() - start
        value = found.impact if objective == "impact" else found.expected_ms
        assert found.bound is not None
        assert found.gap is not None
        hits = " / ".join(f"{hit:.1%}" for hit in found.hits.values())
        print(
            f"{objective:9}  {vram:8}  {ram or '-':>7}  {seconds:7.2f}  {value:11.3f}  {found.bound:11.3f}  "
            f"{found.gap:7.4%}  {sum(found.dense):14}  {hits}"
        )
        good &= seconds < 2 and found.gap < 1e-3
    return good


def naive(n_layer: int = 24, n_ff: int = 96 * 64, n_nodes: int = 1000) -> None:
    """The paper's program as it stands, a binary for every group of 64 neurons and big-M rows, beside prefixes."""
    config, firing = opt(n_layer, 12288, n_ff), Drawn(n_layer, n_ff)
    plans = [LayerPlan(MODE_GATE)] * n_layer
    problem = Problem(artifact_costs(config, plans, threads=PC_HIGH.threads, **CHOICES), firing, PC_HIGH)
    blocks = int(problem.card_block.sum()) + problem.costs.card_head
    neurons = int((problem.card_neuron * n_ff).sum())
    vram = blocks + problem.costs.card_fixed + neurons // 5
    start = time.perf_counter()
    found = place(config, firing, plans, machine=PC_HIGH, vram=vram, objective="impact", **CHOICES)
    ours = time.perf_counter() - start
    start = time.perf_counter()
    status, value, bound = _naive_impact(problem, vram - blocks - problem.costs.card_fixed, n_nodes)
    theirs = time.perf_counter() - start
    fixed = float(problem.block_impact.sum()) + problem.head_impact
    print(f"\n{n_layer} layers x {n_ff // 64} groups, impact of neurons in {(vram - blocks) / 2**20:.0f} MiB")
    print(f"  prefixes          {ours:6.2f} s  {found.impact - fixed:10.4f}  bound {(found.bound or 0) - fixed:10.4f}")
    print(f"  a binary a group  {theirs:6.2f} s  {value:10.4f}  bound {bound:10.4f} (relaxed), {status}, whole groups")


def _naive_impact(problem: Problem, room: int, n_nodes: int) -> tuple[str, float, float]:
    """(status, impact, bound of the relaxed program)."""
    lp = pulp.LpProblem("naive", pulp.LpMaximize)
    groups = np.arange(0, problem.n_ff + 1, 64)
    size = 64 * int(problem.card_neuron[0])
    taken, values = [], []
    for i, least in enumerate(problem.least().tolist()):
        layer = [lp.add_variable(f"group_{i}_{g}", cat="Binary") for g in range(len(groups) - 1)]
        used = lp.add_variable(f"used_{i}", cat="Binary")
        lp += 64 * pulp.lpSum(layer) >= least * used
        lp += pulp.lpSum(layer) <= 1e6 * used
        taken += layer
        values += np.diff(problem.fired[i, groups]).tolist()
    lp += size / 2**20 * pulp.lpSum(taken) <= room / 2**20
    lp += pulp.lpDot(values, taken)

    def impact() -> float:
        return float(sum(value * (x.value() or 0) for value, x in zip(values, taken, strict=True)))

    solve(lp, relaxed=True)
    bound = impact()
    return solve(lp, n_nodes=n_nodes), impact(), bound


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail where a row is slow or not proven")
    arguments = parser.parse_args()
    good = large()
    if not arguments.check:
        naive()
    elif not good:
        sys.exit("a row took 2 s or more, or is further than 0.1 % from its bound")


if __name__ == "__main__":
    main()
