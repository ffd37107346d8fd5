"""What goes to a card at load: budgets as the engine counts them, plans at chunk bounds, the same tokens."""

import itertools
import json
import platform
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from powerinfer_tools.artifact import Artifact, open_artifact
from powerinfer_tools.bench import bench
from powerinfer_tools.checkpoint import Experts
from powerinfer_tools.engine import CardLimits, Engine, Model, Sampling
from powerinfer_tools.engine.generate import CARD_PIECE, PIECE, generate
from powerinfer_tools.engine.native import chunk_bounds
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.evaluate import evaluate
from powerinfer_tools.placement import card, measure
from powerinfer_tools.placement.card import at_bounds, best_plan, card_problem, lending, plan_card
from powerinfer_tools.placement.costs import CARD_PAGE, CARD_TENSOR, kv_bytes, visit_bytes
from powerinfer_tools.placement.hottest import hottest_first
from powerinfer_tools.placement.limits import Opened, fit, open_within, process_bytes
from powerinfer_tools.placement.objective import time
from powerinfer_tools.placement.problem import Budgets, Plan, Problem
from powerinfer_tools.placement.search import Search
from powerinfer_tools.progress import silent
from tests.artifacts import make_artifact, write_artifact
from tests.drawn import STRUCTURES, DrawnCheckpoint, drawn_config
from tests.placement import worlds
from tests.tiny import CORPUS, make_llama

MACHINE = replace(worlds.machine(merge_s=2e-7), threads=2)
HOW: dict[str, Any] = {"ctx_size": 64, "threads": 2}
TIERS: dict[str, Any] = {**HOW, "process": 1 << 20}
MIB = 1 << 20


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a card is asked for, a thread stands in for it."""
    monkeypatch.setenv("POWERINFER_DEVICE", "host")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    make_llama(folder / "model", n_layer=4, n_embd=96, n_ff=1600, n_head=3, n_head_kv=1, head_dim=32, n_ctx=128)
    make_artifact(folder / "model", folder / "gate.gguf", quant="q8_0")
    make_artifact(folder / "model", folder / "predictor.gguf", quant="f16", predictor=True, slack=0.05)
    (folder / "text.txt").write_text(CORPUS * 10, encoding="utf-8")
    return folder


@pytest.fixture(scope="module", params=["gate", "predictor"])
def artifact(request: pytest.FixtureRequest, folder: Path) -> Artifact:
    return open_artifact(folder / f"{request.param}.gguf")


def world(seed: int, n_layer: int = 4, mode: str = "mixed", n_ff: int = 800, **machine: Any) -> Problem:
    """A random world whose neurons are divided where the engine can."""
    drawn = worlds.firing(n_layer, n_ff, seed)
    firing = worlds.Firing(-np.sort(-drawn.frequencies, axis=1))
    config, plans = worlds.config(n_layer, n_ff), worlds.plans(n_layer, mode)
    how: dict[str, Any] = {"quant": "q8_0", "biases": worlds.BIASES, "ctx_size": 64, "threads": 2}
    return card_problem(config, plans, firing, worlds.machine(**machine), **how)


def budgets_of(problem: Problem, share: float) -> Budgets:
    return Budgets(problem.costs.card_fixed + int(share * problem.costs.weights), problem.costs.needed)


@pytest.mark.parametrize("share", [0.1, 0.4, 0.8, 2.0])
@pytest.mark.parametrize("contexts", [1, 2])
def test_what_the_engine_takes_is_what_was_planned_and_within_the_budget(
    artifact: Artifact, share: float, contexts: int
) -> None:
    """The plan counts the padding of every tensor and of rows, of which the host device has none."""
    problem = card.artifact_problem(artifact, MACHINE, contexts=contexts, **HOW)
    vram = budgets_of(problem, share).vram
    opened = open_within(artifact, None, vram, contexts=contexts, machine=MACHINE, **HOW)
    assert opened.card is not None
    assert opened.card.n_bytes <= vram
    engines = [Engine(opened.model, ctx_size=64, threads=2) for _ in range(contexts)]
    info = opened.model.info
    taken = info.card_context_bytes + info.card_bytes + sum(sum(engine.card_memory()) for engine in engines)
    spare = contexts * visit_bytes(artifact.config, artifact.quant)
    spare += CARD_PAGE + CARD_TENSOR * 100 + info.card_bytes // 5
    assert taken <= opened.card.n_bytes <= taken + spare
    for engine in engines:
        engine.close()


def test_weights_lie_in_memory_or_on_the_card_and_ram_is_kept(artifact: Artifact) -> None:
    config = artifact.config
    for vram in (MIB, 9 * MIB, 12 * MIB, 32 * MIB):
        ram = process_bytes() + 2 * artifact.tensor_bytes + 32 * MIB
        opened = open_within(artifact, ram, vram, machine=MACHINE, **HOW)
        assert opened.ram is not None
        assert opened.ram.limits is None
        info, pages = opened.model.info, 4096 * (len(artifact.file.tensors) + 1)
        assert info.resident_bytes <= opened.ram.weights <= info.resident_bytes + pages
        with Engine(opened.model, ctx_size=64, threads=2) as engine:
            assert sum(engine.memory()) == opened.ram.contexts
            blocks = 0 if opened.card is None else int(opened.card.plan.dense.sum())
            assert engine.memory()[0] == kv_bytes(config, config.n_layer - blocks, 64)
            assert engine.card_memory()[0] == kv_bytes(config, blocks, 64)


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_what_lies_neither_on_the_card_nor_in_memory_stays_on_disk(tmp_path: Path, share: float) -> None:
    """Three tiers: memory is counted to the byte, and the tokens are the same."""
    make_llama(tmp_path / "model", n_layer=16, n_embd=96, n_ff=1600, n_head=3, n_head_kv=1, head_dim=32, n_ctx=128)
    artifact = make_artifact(tmp_path / "model", tmp_path / "a.gguf", quant="f16", predictor=True, slack=0.05)
    vram = budgets_of(card.artifact_problem(artifact, MACHINE, **HOW), share).vram
    placed = plan_card(artifact, vram, None, machine=MACHINE, **HOW)
    assert placed is not None
    with pytest.raises(PowerinferError, match="--ram: expected at least") as refused:
        fit(artifact, 0, **TIERS, card=placed)
    least = int(re.findall(r"at least (\d+)", str(refused.value))[0])
    whole = fit(artifact, 1 << 40, **TIERS, card=placed).total
    assert least < whole
    for ram in (least, (least + whole) // 2, whole):
        budget = fit(artifact, ram, **TIERS, card=placed)
        assert budget.total <= ram
        assert (budget.limits is None) == (ram == whole)
        model = Model(artifact.path, budget.limits, placed.limits)
        if budget.limits is not None:
            assert all(k1 <= k2 for k1, k2 in zip(placed.plan.vram, budget.limits.resident, strict=True))
            info = model.info
            assert (info.resident_bytes, info.cache_bytes) == (budget.weights, budget.cache)
            assert info.disk_bytes == budget.beside
        with Engine(model, ctx_size=64, threads=2) as engine, Engine(artifact.path, ctx_size=64, threads=2) as alone:
            assert sum(engine.memory()) == budget.contexts
            for each in (engine, alone):
                each.prefill([1, 2, 3])
            np.testing.assert_array_equal(engine.decode(4, logits=True), alone.decode(4, logits=True))


@pytest.mark.parametrize("routed_by", ["ffn_input", "layer_input"])
def test_of_experts_blocks_and_head_go_to_the_card_and_no_neurons(tmp_path: Path, routed_by: str) -> None:
    fields = {"n_layer": 6, "n_embd": 512, "n_ff": 2400, "n_head": 8, "head_dim": 64, "n_vocab": 2000}
    checkpoint = DrawnCheckpoint(drawn_config(**fields, experts=Experts(6, 2, "softmax", routed_by)))
    artifact = write_artifact(checkpoint, tmp_path / "a.gguf", quant="q8_0")
    problem = card.artifact_problem(artifact, MACHINE, **HOW)
    with Engine(artifact.path, ctx_size=64, threads=2) as alone:
        expected = [alone.prefill([1, 2, 3], logits=True), alone.decode(4, logits=True)]
    for share in (0.05, 0.1, 4.0):
        vram = budgets_of(problem, share).vram
        placed = plan_card(artifact, vram, None, machine=MACHINE, **HOW)
        assert placed is not None
        assert placed.limits.neurons == (0,) * 6
        assert placed.limits.lend_from == 0
        whole = all(placed.limits.dense) and placed.limits.head
        assert whole == (share == 4.0)
        assert any(placed.limits.dense) or placed.limits.head
        most = fit(artifact, 1 << 40, **TIERS, card=placed).total
        for ram in (most, most - 4 * MIB):
            budget = fit(artifact, ram, **TIERS, card=placed)
            model = Model(artifact.path, budget.limits, placed.limits)
            if budget.limits is not None:
                assert model.info.resident_bytes == budget.weights
            with Engine(model, ctx_size=64, threads=2) as engine:
                assert model.info.card_context_bytes + model.info.card_bytes + sum(engine.card_memory()) <= vram
                assert sum(engine.memory()) == budget.contexts
                found = [engine.prefill([1, 2, 3], logits=True), engine.decode(4, logits=True)]
            np.testing.assert_array_equal(found, expected)


def test_a_plan_for_little_memory_takes_more_to_the_card(artifact: Artifact) -> None:
    problem = card.artifact_problem(artifact, MACHINE, **HOW)
    vram, room = budgets_of(problem, 0.4).vram, problem.costs.needed - artifact.tensor_bytes // 3
    plan = best_plan(problem, Budgets(vram, room))
    assert problem.fits(plan, Budgets(vram, room))
    with pytest.raises(PowerinferError, match=r"--ram: expected at least \d+ bytes .* beside --vram \d+, found 5096"):
        best_plan(problem, Budgets(vram, 4096), apart=1000)


def test_a_plan_that_chunks_make_too_large_is_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = world(0)
    budgets = replace(budgets_of(problem, 0.4), ram=problem.costs.needed - problem.costs.weights // 3)
    monkeypatch.setattr(card, "at_bounds", lambda *_: Plan.in_ram(problem.n_layer, problem.n_ff))
    with pytest.raises(PowerinferError, match=f"--ram: expected at least {budgets.ram + 1} bytes .* {budgets.ram}:"):
        best_plan(problem, budgets)


@pytest.mark.slow
def test_tokens_are_the_same_and_counts_are_the_plans(folder: Path) -> None:
    how: dict[str, Any] = {"prompt_tokens": 48, "n_tokens": 12, "repeats": 1, "threads": 2, "progress": silent}
    for name in ("gate", "predictor"):
        path = folder / f"{name}.gguf"
        alone = bench(path, **how)
        assert alone["card"] is None
        seen, problem = set(), card.artifact_problem(open_artifact(path), MACHINE, ctx_size=60)
        for vram in (budgets_of(problem, share).vram for share in (0, 0.1, 0.3, 0.6, 0.9, 3)):
            found = bench(path, vram=vram, machine=MACHINE, **how)
            assert found["output_hash"] == alone["output_hash"]
            tiers = {tier["name"]: tier for tier in found["tiers"]}
            assert sum(tier["neurons_share"] for tier in tiers.values()) == pytest.approx(1)
            assert sum(tier["hits_share"] for tier in tiers.values()) == pytest.approx(1)
            if (on_card := found["card"]) is not None:
                seen.add((on_card["dense_blocks"], tiers["vram"]["neurons_share"]))
                budget = on_card["budget"]
                assert budget["total"] <= budget["planned"] <= budget["vram"] == vram
            assert found["predicted_ms_per_token"] > 0
        assert len(seen) > 3


def test_the_card_computes_its_prefix_of_every_layer_and_what_crosses_is_foreseen(folder: Path) -> None:
    """In mode gate each token computes every deciding row: on the card k1 of each layer."""
    artifact = open_artifact(folder / "gate.gguf")
    problem = card.artifact_problem(artifact, MACHINE, **HOW)
    for vram in (budgets_of(problem, share).vram for share in (0.1, 0.3, 0.6)):
        opened = open_within(artifact, None, vram, machine=MACHINE, **HOW)
        assert opened.card is not None
        plan, n = opened.card.plan, 5
        with Engine(opened.model, ctx_size=64, threads=2) as engine:
            engine.prefill([1, 2, 3])
            engine.reset_stats()
            for token in range(n):
                engine.decode(token)
            stats = engine.stats()
        assert stats.card_neurons == n * int(plan.vram.sum())
        assert stats.neurons_computed == n * artifact.config.n_layer * artifact.config.n_ff
        divided = np.count_nonzero((plan.dense | (plan.vram > 0)) & (~plan.dense | (plan.vram < artifact.config.n_ff)))
        crossings = 2 * divided + np.count_nonzero(np.diff([0, *plan.dense, plan.head, 0]))
        assert crossings <= stats.card_transfers / n <= crossings + divided + 2  # a merged sum may go back, too


@pytest.mark.slow
def test_plans_are_at_bounds_within_the_budget_and_no_slower_than_greedy_or_the_hottest() -> None:
    for seed, share, merge_s in itertools.product(range(6), (0.05, 0.2, 0.5, 0.9), (2e-8, 5e-7)):
        problem = world(seed, mode=("gate", "predictor", "mixed")[seed % 3], merge_s=merge_s)
        budgets = budgets_of(problem, share)
        plan = best_plan(problem, budgets)
        assert problem.fits(plan, budgets)
        assert all(k in bounds for k, bounds in zip(plan.vram, problem.bounds, strict=True))
        searched = Search(problem, time(problem), budgets).best(quick=True).plan
        assert searched is not None
        rivals = [
            Plan.in_ram(problem.n_layer, problem.n_ff),
            searched,
            at_bounds(problem, Plan.in_ram(problem.n_layer, problem.n_ff), budgets),
            hottest_first(problem, budgets.vram),
        ]
        for rival in rivals:
            assert problem.fits(rival, budgets)
            assert problem.seconds(plan) <= problem.seconds(rival)


def test_rounding_keeps_the_budget_and_spends_what_is_left() -> None:
    for seed, share in itertools.product(range(8), (0.1, 0.3, 0.7)):
        problem = world(seed, mode="gate", merge_s=2e-8)
        budgets = budgets_of(problem, share)
        free = Problem(problem.costs, worlds.Firing(np.diff(problem.fired, axis=1)), problem.machine)
        found = Search(free, time(free), budgets).best()
        assert found.plan is not None
        plan = at_bounds(problem, found.plan, budgets)
        assert problem.fits(plan, budgets)
        lowered = np.array(
            [max(b for b in bounds if b <= k) for k, bounds in zip(found.plan.vram, problem.bounds, strict=True)]
        )
        assert problem.seconds(plan) <= problem.seconds(replace(found.plan, vram=lowered))
        for i in np.flatnonzero(plan.vram < problem.n_ff):  # no further chunk both fits and helps
            longer = plan.vram.copy()
            longer[i] = problem.bounds[i][problem.bounds[i] > plan.vram[i]][0]
            more = replace(plan, vram=longer)
            assert not (problem.fits(more, budgets) and problem.seconds(more) < problem.seconds(plan) * (1 - 1e-9))


def test_a_dense_run_is_planned_as_one(folder: Path) -> None:
    """All neurons count alike, at the bounds that the artifact has."""
    artifact = open_artifact(folder / "gate.gguf")
    sparse, dense = (card.artifact_problem(artifact, MACHINE, dense=dense, **HOW) for dense in (False, True))
    assert np.array_equal(sparse.bounds, dense.bounds)
    assert np.array_equal(dense.fired[:, -1], np.full(4, 1600.0))
    budgets = budgets_of(dense, 0.4)
    assert dense.seconds(best_plan(dense, budgets)) <= dense.seconds(best_plan(sparse, budgets))
    opened = open_within(artifact, None, budgets.vram, dense=True, machine=MACHINE, **HOW)
    with Engine(opened.model, ctx_size=64, threads=2, mode="dense") as engine, Engine(artifact.path) as alone:
        np.testing.assert_array_equal(engine.decode(4, logits=True), alone.decode(4, logits=True))


def test_bounds_that_repeat_are_one() -> None:
    problem = world(0, n_ff=352)
    assert all(len(set(bounds[bounds < 352])) == np.count_nonzero(bounds < 352) for bounds in problem.bounds)
    assert [sorted(set(chunk_bounds(np.diff(row).astype(np.float32)))) for row in problem.fired] == [
        sorted(set(bounds.tolist())) for bounds in problem.bounds
    ]


def test_where_nothing_is_gained_no_card_is_used_and_it_is_said(artifact: Artifact) -> None:
    said: list[str] = []
    opened = open_within(artifact, None, 4096, machine=MACHINE, say=said.append, **HOW)
    assert opened.card is None
    assert opened.model.info.card_bytes == 0
    assert len(said) == 1
    assert "nothing is faster on the card within 4096 bytes" in said[0]


def test_more_than_the_card_has_is_refused(artifact: Artifact) -> None:
    assert MACHINE.vram is not None
    small = replace(MACHINE, vram=replace(MACHINE.vram, n_bytes=MIB))
    with pytest.raises(PowerinferError, match=f"--vram: expected at most the card's {MIB} bytes, found {2 * MIB}"):
        plan_card(artifact, 2 * MIB, None, machine=small, **HOW)
    with pytest.raises(PowerinferError, match="has no card"):
        plan_card(artifact, 2 * MIB, None, machine=replace(MACHINE, vram=None), **HOW)


def test_what_runs_without_a_card_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POWERINFER_CACHE", str(tmp_path / "cache"))
    artifact = write_artifact(DrawnCheckpoint(drawn_config(**STRUCTURES["sub norms"])), tmp_path / "a.gguf")
    what = "norms of its neurons' sums"
    for ram in (None, MIB):
        with pytest.raises(PowerinferError, match=f"^--vram: a model with {what} runs on the processor alone so far"):
            open_within(artifact, ram, MIB, **HOW)
    assert not (tmp_path / "cache").exists()


def test_neurons_are_lent_from_where_copying_is_faster(folder: Path) -> None:
    artifact = open_artifact(folder / "gate.gguf")

    def tokens(copy: float, vram: int = 1 << 30, threads: int = 2) -> int:
        assert MACHINE.vram is not None
        return lending(artifact, replace(MACHINE, vram=replace(MACHINE.vram, copy=copy)), vram, threads)

    assert 0 < tokens(1e11) < tokens(2e10) < tokens(2e10, threads=4) <= CARD_PIECE
    assert PIECE < tokens(2e10 * tokens(2e10) / 200) <= CARD_PIECE
    floats = replace(artifact, quant="f16")  # twice the bytes, a third of the speed
    assert MACHINE.vram is not None
    assert 0 < lending(floats, MACHINE, 1 << 30, 2) < lending(artifact, MACHINE, 1 << 30, 2)
    assert tokens(0.0) == tokens(1e6) == tokens(2e10, vram=MIB) == 0


def test_with_a_card_prompts_run_in_the_engines_largest_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lending that pays from 129 tokens on is reached, too."""
    make_llama(tmp_path / "model", n_ctx=512)
    artifact, sizes = make_artifact(tmp_path / "model", tmp_path / "a.gguf"), []
    prefill = Engine.prefill

    def seen(engine: Engine, tokens: list[int], logits: bool = False) -> Any:
        sizes.append(len(tokens))
        return prefill(engine, tokens, logits)

    monkeypatch.setattr(Engine, "prefill", seen)
    n = artifact.config.n_layer
    blocks = CardLimits((True,) * n, (0,) * n, device="host")
    for there, expected in ((None, [128, 128, 44]), (blocks, [256, 44])):
        sizes.clear()
        with Engine(Model(artifact.path, None, there), threads=2) as engine:
            assert len(list(generate(engine, [5] * 300, Sampling(temperature=0), max_tokens=2))) == 2
        assert sizes == expected


def test_room_for_visits_is_taken_only_where_neurons_are_left_to_visit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(card, "VISIT_SHARE", 0.9)  # few layers: one is a large share
    artifact = open_artifact(folder / "gate.gguf")
    costs = card.artifact_problem(artifact, MACHINE, **HOW).costs
    all_of_it = costs.card_fixed + 3 * costs.weights
    n_ff = artifact.config.n_ff
    for vram in (all_of_it, costs.card_fixed + costs.weights * 2 // 3, costs.card_fixed + costs.weights // 3):
        limits = (placed := plan_card(artifact, vram, None, machine=MACHINE, **HOW)) and placed.limits
        assert placed is not None
        assert limits is not None
        left = n_ff - min(limits.neurons)
        taken = placed.n_bytes - int(placed.problem.bytes(placed.plan)[0])
        assert (limits.lend_from > 0) == (taken > 0)
        assert taken in (0, visit_bytes(artifact.config, artifact.quant, left))
        assert placed.n_bytes <= vram
        if vram == all_of_it:
            assert (left, taken) == (0, 0)
        else:
            assert min(left, taken) > 0


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """This machine was measured before, and is MACHINE."""
    monkeypatch.setenv("POWERINFER_CACHE", str(tmp_path))
    monkeypatch.setenv("POWERINFER_THREADS", "2")
    known: dict[str, Any] = {"card": measure.describe_card("host")[0], "disk_device": tmp_path.stat().st_dev}
    here = replace(MACHINE, name=measure._processor(), **known)
    measure.write_machine(here, tmp_path / f"machine-{platform.node() or 'here'}-2.json")


@pytest.mark.usefixtures("measured")
def test_eval_with_a_card_scores_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how: dict[str, Any] = {"n_tokens": 128, "window": 64, "threads": 2, "progress": silent}
    alone = evaluate(folder / "gate.gguf", [folder / "text.txt"], **how)
    opened: list[Opened] = []

    def seen(*args: Any, **how: Any) -> Opened:
        opened.append(open_within(*args, **how))
        return opened[-1]

    monkeypatch.setattr("powerinfer_tools.evaluate.open_within", seen)
    assert evaluate(folder / "gate.gguf", [folder / "text.txt"], vram=32 * MIB, **how).as_dict() == alone.as_dict()
    assert [each.card is not None for each in opened] == [True]


def powerinfer(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "powerinfer_tools.cli.main", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.usefixtures("measured")
@pytest.mark.slow
def test_commands_take_vram(folder: Path) -> None:
    model, prompt = folder / "gate.gguf", ("-p", "Once", "--temp", 0, "-n", 4, "--ctx-size", 64)
    plain, card = (powerinfer("generate", model, *prompt, "--json", "--vram", vram) for vram in ("0", "16MiB"))
    assert "stands in for the card" in card.stderr
    assert card.stderr.count("\n") == 1
    assert plain.stderr == ""
    assert json.loads(plain.stdout)["tokens"] == json.loads(card.stdout)["tokens"]
    shown = powerinfer("bench", model, "--vram", "16MiB", "--prompt-tokens", 8, "--decode-tokens", 4, "--repeats", 1)
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"its budget, all counted +16.0 MiB, .* used", shown.stdout)


def own_peak(document: dict[str, Any]) -> int:
    """The process's memory without that of the thread which stands in for the card."""
    return int(document["peak_rss_bytes"] - document["card"]["budget"]["total"])


@pytest.mark.slow
@pytest.mark.usefixtures("measured")
def test_the_memory_that_is_named_does_with_a_card_and_a_disk(tmp_path: Path) -> None:
    """Of a process of its own: what planning itself takes is counted, and the peak is within."""
    make_llama(tmp_path / "model", n_layer=8, n_embd=128, n_ff=4096, n_head=4, n_head_kv=2, head_dim=32, n_ctx=128)
    artifact = make_artifact(tmp_path / "model", tmp_path / "a.gguf", quant="f32", predictor=True, slack=0.05)
    sizes = "--prompt-tokens", 8, "--decode-tokens", 4, "--repeats", 1, "--json"

    def bench_within(ram: object) -> subprocess.CompletedProcess[str]:
        return powerinfer("bench", artifact.path, "--vram", "20MiB", *sizes, "--ram", ram)

    refused = bench_within("16MiB")
    named = re.search(r"--ram: expected at least (\d+) bytes .* beside --vram 20971520, found 16777216", refused.stderr)
    assert named is not None, refused.stderr
    found = bench_within(named[1])
    assert found.returncode == 0, found.stderr
    document = json.loads(found.stdout)
    assert document["disk"]["budget"]["total"] <= int(named[1])
    assert document["card"]["budget"]["total"] <= 20 * MIB
    assert own_peak(document) <= int(named[1])
    before = next(tmp_path.glob("machine-*"))
    before.unlink()  # and then the machine is measured first, by a process of its own, the disk, too
    roomy = int(named[1]) + 12 * MIB  # as another machine may have less on its card
    anew = bench_within(roomy)
    assert anew.returncode == 0, anew.stderr
    assert "measuring this machine" in anew.stderr
    assert own_peak(json.loads(anew.stdout)) <= roomy
    assert json.loads(before.read_text())["disk_device"] == artifact.path.stat().st_dev
    again = bench_within(roomy)
    assert again.returncode == 0, again.stderr
    assert "measuring" not in again.stderr


def test_without_vram_no_card_is_touched_and_a_missing_one_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("POWERINFER_DEVICE")
    monkeypatch.setenv("POWERINFER_CACHE", str(tmp_path))
    (tmp_path / "cuda.so").write_text("no library")
    monkeypatch.setenv("POWERINFER_CUDA_LIB", str(tmp_path / "cuda.so"))
    words = folder / "gate.gguf", "-p", "Once", "--temp", 0, "-n", 4, "--ctx-size", 64
    assert powerinfer("generate", *words).returncode == powerinfer("generate", *words, "--vram", 0).returncode == 0
    for command in ("generate", "chat", "bench", "eval"):
        extra = {
            "generate": words[1:],
            "eval": ("--corpus", folder / "text.txt", "--window", 64),
            "bench": ("--prompt-tokens", 8, "--decode-tokens", 4),
        }
        failed = powerinfer(command, folder / "gate.gguf", *extra.get(command, ()), "--vram", "1GiB")
        assert failed.returncode == 1
        assert failed.stderr.startswith("powerinfer: no CUDA part of the engine (make native CUDA=1)")
        assert failed.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "cuda.so"]  # nothing was measured
