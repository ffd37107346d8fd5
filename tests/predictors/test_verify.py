"""Layers whose predictor changes what the whole model says go back to gate mode; the others stay."""

import pytest
import torch

from powerinfer_tools import reference
from powerinfer_tools.checkpoint import Checkpoint
from powerinfer_tools.predictors.fit import Network
from powerinfer_tools.predictors.verify import Loss, Screen, Tolerance, verify
from powerinfer_tools.progress import silent
from tests.drawn import DrawnCheckpoint, drawn_config

N_EMBD, N_FF = 64, 96


@pytest.fixture(
    scope="module", params=[{}, {"parallel": True, "sub_norms": True}], ids=["plain", "parallel, sub-norms"]
)
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    return DrawnCheckpoint(drawn_config(n_layer=4, n_embd=N_EMBD, n_ff=N_FF, **request.param))


@pytest.fixture
def tokens(checkpoint: Checkpoint) -> torch.Tensor:
    return torch.randint(checkpoint.config.n_vocab, (3, 40), generator=torch.Generator().manual_seed(3))


def screen(kept: int) -> Screen:
    """Lets the first `kept` neurons through, whatever comes in."""
    bias = torch.where(torch.arange(N_FF) < kept, 1.0, -1.0)
    network = Network(torch.zeros(32, N_EMBD), torch.zeros(N_FF, 32), bias, False)
    return Screen(network, torch.zeros(N_FF, dtype=torch.bool))


def test_harmless_predictors_stay_and_nothing_is_lost(checkpoint: Checkpoint, tokens: torch.Tensor) -> None:
    kept, loss = verify(checkpoint, tokens, {0: screen(N_FF), 2: screen(N_FF)}, Tolerance(0.98, 0.005), silent)
    assert (kept, loss) == ([0, 2], Loss(tokens.numel(), 1.0, pytest.approx(0.0, abs=1e-6)))


def test_those_that_change_too_much_go_back_to_gate_mode(checkpoint: Checkpoint, tokens: torch.Tensor) -> None:
    screens = {0: screen(N_FF), 1: screen(0), 2: screen(N_FF), 3: screen(0)}
    kept, loss = verify(checkpoint, tokens, screens, Tolerance(0.98, 0.005), silent)
    assert kept == [0, 2]
    assert loss.top1 == 1.0


def test_what_is_tolerated_stays_and_is_reported(checkpoint: Checkpoint, tokens: torch.Tensor) -> None:
    screens = {1: screen(0), 3: screen(0)}
    kept, loss = verify(checkpoint, tokens, screens, Tolerance(0.0, 1e9), silent)
    assert kept == [1, 3]
    exact, changed = (likeliest(checkpoint, tokens, without) for without in ((), (1, 3)))
    assert loss.top1 == pytest.approx(float((exact == changed).float().mean()))
    assert loss.top1 < 0.98


def likeliest(checkpoint: Checkpoint, tokens: torch.Tensor, without: tuple[int, ...]) -> torch.Tensor:
    """The model's likeliest next tokens where these layers have no FFN."""
    hidden = reference.embed(checkpoint, tokens)
    for i in range(checkpoint.config.n_layer):
        layer = reference.load_layer(checkpoint, i)
        after, x = layer.attention(hidden)
        hidden = after if i in without else after + layer.ffn(x)
    return reference.logits(checkpoint, hidden).argmax(-1)


def test_neurons_that_are_always_computed_pass(checkpoint: Checkpoint) -> None:
    always = torch.zeros(N_FF, dtype=torch.bool)
    always[[3, 90]] = True
    passes = Screen(screen(2).network, always).passes(torch.randn(5, N_EMBD))
    assert passes.nonzero()[:, 1].tolist() == [0, 1, 3, 90] * 5


def test_a_loss_tells_how_many_times_too_large_it_is() -> None:
    tolerance = Tolerance(0.98, 0.005)
    assert Loss(100, 0.96, 0.0).excess(tolerance) == pytest.approx(4)  # disagreement twice as much: a change four times
    assert Loss(100, 1.0, 0.01).excess(tolerance) == pytest.approx(2)
