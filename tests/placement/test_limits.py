"""A budget of memory: counted to the byte, kept, and refused where it cannot do."""

import mmap
import re
from dataclasses import replace

import numpy as np
import pytest

from powerinfer_tools.artifact import Artifact
from powerinfer_tools.bench import bench
from powerinfer_tools.engine import Engine, Model
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.placement import place
from powerinfer_tools.placement.costs import artifact_costs
from powerinfer_tools.placement.limits import SLACK, disk_costs, expected_reads, fit, process_bytes
from powerinfer_tools.placement.machine import Tier
from powerinfer_tools.placement.problem import Plan, Problem
from powerinfer_tools.progress import silent
from tests.artifacts import make_artifact
from tests.placement import worlds
from tests.tiny import make_llama

HOW = {"ctx_size": 64, "threads": 2, "process": 1 << 20}


@pytest.fixture(scope="module", params=["gate", "predictor"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("limits")
    make_llama(folder / "model", n_layer=16, n_embd=96, n_ff=1600, n_head=3, n_head_kv=1, head_dim=32, n_ctx=128)
    predictor = request.param == "predictor"
    return make_artifact(folder / "model", folder / "a.gguf", quant="f16", predictor=predictor, slack=0.05)


def whole(artifact: Artifact) -> int:
    """The smallest budget with which everything stays in memory."""
    return fit(artifact, 1 << 40, **HOW).total


@pytest.mark.parametrize("share", [0.7, 0.8, 0.9])
@pytest.mark.parametrize("contexts", [1, 2])
def test_memory_is_what_was_counted_and_within_the_budget(artifact: Artifact, share: float, contexts: int) -> None:
    how = HOW | {"contexts": contexts}
    size = fit(artifact, 1 << 40, **how).total
    budget = fit(artifact, size - int((1 - share) * disk_costs(artifact).weights([1600] * 16)), **how)
    assert budget.limits is not None
    assert budget.total <= budget.ram < budget.total + 32 * 4096  # spent, but for less than a neuron a layer
    model = Model(artifact.path, budget.limits)
    assert (model.info.resident_bytes, model.info.cache_bytes) == (budget.weights, budget.cache)
    assert model.info.disk_bytes == budget.beside
    with Engine(model, ctx_size=64, threads=2) as engine:
        assert contexts * sum(engine.memory()) == budget.contexts


def test_what_fits_stays_in_memory(artifact: Artifact) -> None:
    size = whole(artifact)
    assert fit(artifact, size, **HOW).limits is None
    assert fit(artifact, size - 1, **HOW).limits is not None


def test_a_budget_that_cannot_do_names_the_smallest_that_would(artifact: Artifact) -> None:
    with pytest.raises(PowerinferError, match=r"--ram: expected at least \d+ bytes .*found 4096") as error:
        fit(artifact, 4096, **HOW)
    found = re.search(r"at least (\d+)", str(error.value))
    assert found is not None
    least = int(found[1])
    assert fit(artifact, least, **HOW).limits is not None
    with pytest.raises(PowerinferError, match=f"at least {least}"):
        fit(artifact, least - 1, **HOW)


def test_the_neurons_that_fire_most_stay(artifact: Artifact) -> None:
    limits = fit(artifact, whole(artifact) - (4 << 20), **HOW).limits
    assert limits is not None
    kept = min(artifact.frequency(i)[k - 1] for i, k in enumerate(limits.resident) if k > artifact.always[i])
    left = max(artifact.frequency(i)[k] for i, k in enumerate(limits.resident))
    assert kept >= left
    assert 0 < expected_reads(artifact, limits.resident) < expected_reads(artifact, np.zeros(16, int))


def test_what_stays_is_what_place_would_choose(artifact: Artifact) -> None:
    """Where reads decide and no cache is kept, hottest first is as fast as the plan of `place` with as much memory."""
    config, threads = artifact.config, 2
    slow_disk = Tier(1 << 40, 1e9, tuple((size, size / (12e-6 + size / 1e9)) for size in (512, 1024, 4096, 65536)))
    machine = replace(worlds.machine(disk_latency_s=0.0), threads=threads, vram=None, disk=slow_disk)
    firing = worlds.Firing(np.stack([artifact.frequency(i) for i in range(config.n_layer)]).astype(np.float64))
    biases = frozenset(name for name in artifact.file.tensors if name.endswith(".bias"))
    how = {"quant": artifact.quant, "biases": biases, "ctx_size": 64}
    problem = Problem(artifact_costs(config, artifact.plans, threads=threads, **how), firing, machine)
    for missing in (1 << 20, 2 << 20, 4 << 20):
        limits = fit(artifact, whole(artifact) - missing, cache_share=0.0, **HOW).limits
        assert limits is not None
        n = config.n_layer
        plan = Plan(np.zeros(n, bool), False, np.zeros(n, np.int64), np.array(limits.resident))
        assert 0 < sum(limits.resident) < n * config.n_ff
        ram = int(problem.bytes(plan)[1])
        placed = place(config, firing, artifact.plans, machine=machine, ram=ram, **how)
        best = placed.expected_ms * 1e-3
        assert problem.seconds(plan) <= 1.0001 * best < problem.seconds(replace(plan, ram=plan.ram[::-1]))


def test_where_little_is_left_on_disk_the_cache_is_small(artifact: Artifact) -> None:
    for missing in (1, 1 << 18):
        limits = fit(artifact, whole(artifact) - missing, **HOW).limits
        assert limits is not None
        on_disk = sum(max(0, 1600 - k - limits.slots) for k in limits.resident)
        cached = sum(min(limits.slots, 1600 - k) for k in limits.resident)
        assert cached <= on_disk


def test_a_larger_cache_leaves_shorter_prefixes(artifact: Artifact) -> None:
    small, large = (fit(artifact, whole(artifact) - (4 << 20), cache_share=x, **HOW).limits for x in (0.1, 0.8))
    assert small is not None
    assert large is not None
    assert sum(small.resident) > sum(large.resident)
    assert small.slots < large.slots


def test_the_process_counts_as_it_is() -> None:
    before = process_bytes()
    held = mmap.mmap(-1, 64 << 20)  # not from the heap, where as much may lie free and be counted already
    for _ in range(64):
        held.write(bytes([1]) * (1 << 20))
    assert process_bytes() - before > 0.95 * len(held) > SLACK  # the system's own count lags by some pages


@pytest.mark.slow
def test_bench_within_a_budget_gives_the_same_tokens(artifact: Artifact) -> None:
    how = {"prompt_tokens": 16, "n_tokens": 12, "repeats": 1, "threads": 2, "progress": silent}
    costs = artifact_costs(
        artifact.config, artifact.plans, quant=artifact.quant, biases=frozenset(), ctx_size=28, threads=2
    )
    resident = bench(artifact.path, **how)
    ram = process_bytes() + costs.scratch + int(0.75 * costs.weights)
    found = bench(artifact.path, ram=ram, **how)
    assert found["output_hash"] == resident["output_hash"]
    assert resident["disk"] is None
    tiers = {tier["name"]: tier for tier in found["tiers"]}
    assert list(tiers) == ["prefix", "cache", "disk"]
    assert sum(tier["hits_share"] for tier in tiers.values()) == pytest.approx(1)
    assert tiers["prefix"]["neurons_share"] + tiers["disk"]["neurons_share"] == pytest.approx(1)
    assert found["disk"]["budget"]["total"] <= found["disk"]["budget"]["ram"] == ram
    assert found["disk"]["reads_per_token"] > 0
    assert 0 < found["disk"]["padding_share"] < 1
    assert found["first_token_s"] > 0
