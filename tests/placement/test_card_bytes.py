"""What the CUDA part takes on a card, an emulation of CUDA, is what it counts, and within what was planned."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from powerinfer_tools.checkpoint import Experts
from powerinfer_tools.engine import CardLimits, Engine, Model
from powerinfer_tools.engine.native import describe_card
from powerinfer_tools.placement import Machine, card
from powerinfer_tools.placement.costs import CARD_PAGE
from tests.artifacts import make_artifact, write_artifact
from tests.drawn import DrawnCheckpoint, drawn_config
from tests.engine.test_cuda import emulated
from tests.placement import worlds
from tests.tiny import make_llama, make_opt

__all__ = ["emulated"]  # for all tests here

pytestmark = pytest.mark.slow
HOW: dict[str, Any] = {"ctx_size": 100, "threads": 2}
GRAPHS = 2 << 20  # counted for a context's recorded commands, which the emulation keeps elsewhere


def the_machine() -> Machine:
    """A fast card with the context of the one that is there."""
    machine = worlds.machine(merge_s=2e-10)
    assert machine.vram is not None
    return replace(machine, threads=2, vram=replace(machine.vram, context=describe_card()[3]))


@pytest.mark.parametrize("quant", ["f16", "q4_0"])
@pytest.mark.parametrize("predictor", [False, True])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_cuda_part_stays_within_the_plan(tmp_path: Path, family: str, predictor: bool, quant: str) -> None:
    if family == "llama":
        make_llama(tmp_path / "m", n_layer=3, n_embd=96, n_ff=352, n_head=6, n_head_kv=2, head_dim=20, bias=True)
    else:
        make_opt(tmp_path / "m", n_layer=3, n_embd=96, n_head=3, n_ff=333)
    artifact = make_artifact(tmp_path / "m", tmp_path / "m.gguf", quant=quant, predictor=predictor)
    machine = the_machine()
    for contexts in (1, 2):
        costs = card.artifact_problem(artifact, machine, contexts=contexts, **HOW).costs
        for share in (0.5, 2.0):
            vram = costs.card_fixed + int(share * costs.weights)
            placed = card.plan_card(artifact, vram, None, contexts=contexts, machine=machine, **HOW)
            assert placed is not None
            assert placed.n_bytes <= vram
            counted = run_with(placed.n_bytes, artifact.path, placed.limits, contexts)
            assert counted <= placed.n_bytes
            assert run_with(counted - contexts * GRAPHS, artifact.path, placed.limits, contexts) == counted


def test_of_experts_no_room_for_neurons_is_counted(tmp_path: Path) -> None:
    fields = {"n_layer": 2, "n_embd": 256, "n_ff": 8192, "n_head": 4, "experts": Experts(4, 2, "softmax", "ffn_input")}
    artifact = write_artifact(DrawnCheckpoint(drawn_config(**fields)), tmp_path / "m.gguf", quant="f16")
    placed = card.plan_card(artifact, 1 << 30, None, machine=the_machine(), **HOW)
    assert placed is not None
    assert all(placed.limits.dense)
    counted = run_with(placed.n_bytes, artifact.path, placed.limits, 1)
    pages = 5 * CARD_PAGE  # weights, KV cache, scratch, graphs, context: each may leave most of one
    assert counted <= placed.n_bytes <= counted + pages


def run_with(room: int, path: Path, limits: CardLimits, contexts: int) -> int:
    """What the engine counts, on a card that never has a byte more than `room`."""
    context, before = describe_card()[3], allocated()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "CUDA_EMULATION_BYTES", str(before + room - context))
        model = Model(path, None, limits)
        engines = [Engine(model, ctx_size=100, threads=2) for _ in range(contexts)]
        for engine in engines:
            engine.prefill([1, 2, 3])
            engine.decode(4)
            engine.score([5, 6])
        assert model.info.card_context_bytes == context
        counted = model.info.card_bytes + sum(sum(engine.card_memory()) for engine in engines)
        assert allocated() - before == counted - contexts * GRAPHS
        return context + counted


def allocated() -> int:
    _, total, free, _ = describe_card()
    return total - free
