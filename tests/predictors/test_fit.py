"""Starts, rounding, gradients and bounds on plain tensors."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from powerinfer_tools.artifact.layout import QUANTS
from powerinfer_tools.predictors.choose import HeldOut, choose
from powerinfer_tools.predictors.fit import Network, Start, _gradients, fine_tune, rounded
from powerinfer_tools.predictors.select import FfnCosts

N_EMBD, N_FF = 128, 256
COSTS = FfnCosts(N_EMBD, N_FF, 2, "q4_0")


def planted_samples(n: int = 2000, rank: int = 12, noise: float = 0.05, seed: int = 0):
    """Inputs with uneven, correlated channels, gates of low rank plus noise, and who fires."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(N_EMBD, N_EMBD, generator=rng) * torch.logspace(-1, 1, N_EMBD)[:, None]
    x = torch.randn(n, N_EMBD, generator=rng) @ mix / N_EMBD**0.5 + torch.randn(N_EMBD, generator=rng)
    gate = torch.randn(N_FF, rank, generator=rng) @ torch.randn(rank, N_EMBD, generator=rng)
    gate += noise * rank**0.5 * torch.randn(N_FF, N_EMBD, generator=rng)
    g = x @ gate.T
    g -= torch.quantile(g, torch.linspace(0.3, 0.995, N_FF).mean().item(), dim=0)
    return x, gate, g > 0, g


def held_out(x, fired, g, seed: int = 1) -> HeldOut:
    down = torch.randn(N_FF, N_EMBD, generator=torch.Generator().manual_seed(seed))
    return HeldOut(x, fired, g.relu(), down, torch.argsort(-fired.sum(0), stable=True))


@pytest.mark.parametrize("relu", [False, True])
def test_start_finds_planted_low_rank(relu):
    x, gate, fired, g = planted_samples()
    rank = 64 if relu else 32
    network = Start(gate, x[:1500]).network(rank, relu, x[:1500], fired[:1500])
    assert (len(network.w_in), network.w_out.shape) == (rank, (N_FF, rank))
    choice = choose(network, held_out(x[1500:], fired[1500:], g[1500:]), COSTS, 0.98, 0.02)
    assert choice.recall >= 0.98
    assert choice.found / choice.computed > 0.7
    assert choice.computed < 0.6 * N_FF


@pytest.mark.parametrize("quant", QUANTS)
def test_rounding_twice_is_rounding_once(quant):
    weights = torch.randn(40, 96, generator=torch.Generator().manual_seed(0))
    once = rounded(weights, quant)
    assert torch.equal(rounded(once, quant), once)
    assert (once - weights).abs().max() < {"f32": 1e-9, "f16": 2e-3, "q8_0": 0.02, "q4_0": 0.3}[quant]
    assert torch.equal(once, weights) == (quant == "f32")


def test_stored_network_is_what_its_rounded_weights_compute():
    x, gate, fired, _ = planted_samples()
    network = Start(gate, x).network(32, True, x, fired).stored("q4_0", x, fired)
    for w in (network.w_in, network.w_out):
        assert torch.equal(rounded(w, "q4_0"), w)
    z = np.maximum(x.numpy() @ network.w_in.numpy().T, 0)
    expected = z @ network.w_out.numpy().T + network.bias.numpy()
    np.testing.assert_allclose(network.logits(x).numpy(), expected, atol=1e-3)


@pytest.mark.parametrize("relu", [False, True])
def test_gradients_are_those_of_the_weighted_cross_entropy(relu):
    rng = torch.Generator().manual_seed(0)
    w_in, w_out = torch.randn(8, 16, generator=rng), torch.randn(24, 8, generator=rng)
    bias, x = torch.randn(24, generator=rng), torch.randn(10, 16, generator=rng)
    fired = (torch.rand(10, 24, generator=rng) < 0.3).float()
    found = _gradients(Network(w_in, w_out, bias, relu), x, fired)
    parameters = [p.clone().requires_grad_() for p in (w_in, w_out, bias)]
    z = x @ parameters[0].T
    logits = (z.relu() if relu else z) @ parameters[1].T + parameters[2]
    from powerinfer_tools.predictors.fit import POSITIVE_WEIGHT

    weight = torch.tensor(POSITIVE_WEIGHT)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, fired, pos_weight=weight, reduction="sum")
    for mine, theirs in zip(found, torch.autograd.grad(loss / len(x), parameters), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_fine_tuning_mends_a_damaged_network_and_returns_the_best_it_saw():
    x, gate, fired, g = planted_samples()
    held = held_out(x[1500:], fired[1500:], g[1500:])
    start = Start(gate, x[:1500]).network(32, False, x[:1500], fired[:1500])
    noise = torch.randn(start.w_out.shape, generator=torch.Generator().manual_seed(1))
    start = replace(start, w_out=start.w_out + 0.3 * start.w_out.std() * noise)
    seen = []

    def judge(network: Network) -> float:
        seen.append(choose(network, held, COSTS, 0.98, 0.02).bytes)
        return seen[-1]

    generator = torch.Generator().manual_seed(0)
    tuned = fine_tune(start, x[:1500], fired[:1500], "q4_0", judge, float("inf"), generator)
    assert choose(tuned, held, COSTS, 0.98, 0.02).bytes == min(seen)
    assert min(seen) < 0.97 * seen[0]


@pytest.mark.parametrize(("recall", "error"), [(0.9, 1.0), (0.98, 0.02), (0.999, 0.02), (0.5, 0.01), (1.0, 0.0)])
def test_bounds_are_kept_and_the_threshold_is_the_largest(recall, error):
    x, gate, fired, g = planted_samples()
    held = held_out(x, fired, g)
    network = Start(gate, x).network(32, False, x, fired)
    choice = choose(network, held, COSTS, recall, error)
    assert choice.recall >= recall
    assert choice.error <= error
    logits = held.logits(network)
    computed = logits >= choice.threshold
    computed[:, : choice.always] = True
    assert choice.computed == pytest.approx(float(computed.sum(1).float().mean()))
    missed = held.fired & ~computed
    assert held.error(missed) == pytest.approx(choice.error)
    asked = logits[:, choice.always :][held.fired[:, choice.always :]].sort().values
    further = asked[min(int((asked <= choice.threshold).sum()) + len(asked) // 100, len(asked) - 1)]
    computed = logits >= further
    computed[:, : choice.always] = True
    missed = held.fired & ~computed
    kept = 1 - float(missed.sum()) / held.n_fired
    assert kept < recall or held.error(missed) > error


def test_neurons_that_never_fire_are_not_let_through():
    x, gate, fired, g = planted_samples()
    fired[:, :50] = False
    choice_network = Start(gate, x).network(32, False, x, fired)
    held = HeldOut(x, fired, g.relu() * fired, torch.randn(N_FF, N_EMBD), torch.arange(N_FF))
    choice = choose(choice_network, held, COSTS, 0.98, 0.05)
    assert float((held.logits(choice_network)[:, :50] >= choice.threshold).float().mean()) < 0.01
