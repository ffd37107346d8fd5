"""What the CUDA part takes on a card, counted by itself on an emulation of CUDA, is within what was planned."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from powerinfer_tools.checkpoint import Experts
from powerinfer_tools.engine import Engine
from powerinfer_tools.engine.native import describe_card
from powerinfer_tools.placement import Machine, card
from powerinfer_tools.placement.costs import CARD_PAGE
from powerinfer_tools.placement.limits import Opened, open_within
from tests.artifacts import make_artifact, write_artifact
from tests.drawn import DrawnCheckpoint, drawn_config
from tests.engine.test_cuda import emulated
from tests.placement import worlds
from tests.tiny import make_llama, make_opt

__all__ = ["emulated"]  # for all tests here

pytestmark = pytest.mark.slow
HOW: dict[str, Any] = {"ctx_size": 100, "threads": 2}


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
            opened = open_within(artifact, None, vram, contexts=contexts, machine=machine, **HOW)
            assert opened.card is not None
            assert taken(opened, contexts) <= opened.card.n_bytes <= vram


def test_of_experts_no_room_for_neurons_is_counted(tmp_path: Path) -> None:
    fields = {"n_layer": 2, "n_embd": 256, "n_ff": 8192, "n_head": 4, "experts": Experts(4, 2, "softmax", "ffn_input")}
    artifact = write_artifact(DrawnCheckpoint(drawn_config(**fields)), tmp_path / "m.gguf", quant="f16")
    opened = open_within(artifact, None, 1 << 30, machine=the_machine(), **HOW)
    assert opened.card is not None
    assert all(opened.card.limits.dense)
    pages = 5 * CARD_PAGE  # weights, KV cache, scratch, graphs, context: each may leave most of one
    assert taken(opened, 1) <= opened.card.n_bytes <= taken(opened, 1) + pages


def taken(opened: Opened, contexts: int) -> int:
    """Bytes of the card that so many contexts take, one of which has run."""
    engines = [Engine(opened.model, ctx_size=100, threads=2) for _ in range(contexts)]
    engines[0].prefill([1, 2, 3])
    engines[0].decode(4)
    info = opened.model.info
    return info.card_context_bytes + info.card_bytes + sum(sum(engine.card_memory()) for engine in engines)
