"""The student computes what its checkpoint says, and learns through its cut."""

from typing import Any

import pytest
import torch

from powerinfer_tools.checkpoint import Merged
from powerinfer_tools.reference import forward
from powerinfer_tools.sparsify.loss import add_gradients, follow
from powerinfer_tools.sparsify.model import Projection, Student, StudentFfn, load_teacher, make_student
from powerinfer_tools.sparsify.run import learnt_changes
from powerinfer_tools.sparsify.thresholds import calibrate, quantiles
from tests.drawn import DrawnCheckpoint, drawn_config, rope_of
from tests.sparsify.conftest import Bench


def student_of(bench: Bench, activation: str = "silu", rank: int | None = None) -> Student:
    return make_student(load_teacher(bench.checkpoint, "cpu", "float32"), activation, rank, seed=0)


def shift(student: Student) -> None:
    """As if it had learnt: every trained tensor a little off."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in student.trained.values():
            weight += 0.02 * torch.randn(weight.shape, generator=generator)


def logits(student: Student, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return student.logits(follow(student, tokens, student.teacher.streams(tokens))[0])


def test_the_teacher_is_the_reference(bench: Bench, tokens: torch.Tensor) -> None:
    teacher = load_teacher(bench.checkpoint, "cpu", "float32")
    assert torch.equal(teacher.logits(teacher.streams(tokens)[-1]), forward(bench.checkpoint, tokens))


def test_a_student_of_another_structure_begins_as_the_reference(tokens: torch.Tensor) -> None:
    structure = {"parallel": True, "qk_norm": True, "rope": rope_of(6), "norm": "layer", "rotary": (True, False)}
    checkpoint = DrawnCheckpoint(drawn_config(**structure, activation="silu"), biases=("ffn_gate", "ffn_down"))
    student = make_student(load_teacher(checkpoint, "cpu", "float32"), "silu", None, seed=0)
    torch.testing.assert_close(logits(student, tokens), forward(checkpoint, tokens))


def test_attention_in_bfloat16_is_that_of_float32_but_for_rounding(bench: Bench, tokens: torch.Tensor) -> None:
    layer = load_teacher(bench.checkpoint, "cpu", "float32").layers[0]
    x = layer.attn_norm(torch.randn(*tokens.shape, bench.checkpoint.config.n_embd))
    exact = layer.attn(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = layer.attn(x)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).square().sum() <= 1e-3 * exact.square().sum()


@pytest.mark.parametrize("rank", [None, 4])
def test_a_student_begins_as_its_teacher(bench: Bench, tokens: torch.Tensor, rank: int | None) -> None:
    torch.testing.assert_close(logits(student_of(bench, rank=rank), tokens), forward(bench.checkpoint, tokens))


@pytest.mark.parametrize(
    ("activation", "rank", "threshold"),
    [("silu", None, 0.2), ("silu", 4, 0.2), ("relu", None, 0.0), ("fatrelu", None, 0.1), ("drelu", None, 0.1)],
)
def test_a_student_is_what_its_checkpoint_says(
    bench: Bench, tokens: torch.Tensor, activation: str, rank: int | None, threshold: float
) -> None:
    student = student_of(bench, activation, rank)
    student.set_thresholds([threshold] * 2)
    shift(student)
    with torch.no_grad():
        for name, weight in student.trained.items():
            if name.endswith((".a", ".b")):
                weight.copy_(weight.half())  # as it is shipped
    merged = Merged(bench.checkpoint, activation, student.thresholds, learnt_changes(student))
    found = logits(student, tokens)
    torch.testing.assert_close(found, forward(merged, tokens), atol=1e-5, rtol=1e-5)
    assert (found - forward(bench.checkpoint, tokens)).abs().max() > 0.05


def test_the_gradient_passes_where_the_activation_is_kept() -> None:
    gate = torch.tensor([[[-3.0, -0.5, 0.05, 1.0]]], requires_grad=True)
    ffn = StudentFfn("silu", 0.15, *(Projection(torch.eye(4), None) for _ in range(3)))
    ffn.gate = Projection(torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.0])), None)
    ffn.up = Projection(torch.zeros(4, 4), torch.ones(4))
    y, firing = ffn(gate)
    y.sum().backward()
    plain = gate.detach().clone().requires_grad_()
    a = torch.nn.functional.silu(plain)
    a.sum().backward()
    kept = a.detach().abs() >= 0.15  # silu(-3) = -0.14 is not
    assert kept[0, 0].tolist() == [False, True, False, True]
    assert plain.grad is not None
    assert gate.grad is not None
    torch.testing.assert_close(gate.grad, plain.grad * kept)
    assert firing.share.tolist() == [0.5]


def test_only_what_is_named_learns(bench: Bench, tokens: torch.Tensor) -> None:
    before = bench.checkpoint.digest()
    student = student_of(bench)
    teacher = forward(bench.checkpoint, tokens)
    add_gradients(student, tokens, 0.5, len(tokens))
    assert all(weight.grad is not None for weight in student.trained.values())
    shift(student)
    streams = student.teacher.streams(tokens)
    assert torch.equal(student.teacher.logits(streams[-1]), teacher)
    assert bench.checkpoint.digest() == before
    parts = {name.split(".")[2] for name in student.trained if name.startswith("blk")}
    assert parts == {"attn_norm", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"}


def test_gradients_of_parts_are_those_of_the_whole(bench: Bench, tokens: torch.Tensor) -> None:
    """Windows one by one, and logits a few positions at a time."""
    whole, parts = student_of(bench, "relu"), student_of(bench, "relu")
    outcome = add_gradients(whole, tokens, 0.3, len(tokens))
    means: list[Any] = [add_gradients(parts, window[None], 0.3, len(tokens)) for window in tokens]
    for name, weight in whole.trained.items():
        torch.testing.assert_close(weight.grad, parts.trained[name].grad, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(outcome.divergence, torch.stack([m.divergence for m in means]).mean())
    assert outcome.divergence > 0.001


def test_bfloat16_is_near(bench: Bench, tokens: torch.Tensor) -> None:
    teacher = load_teacher(bench.checkpoint, "cpu", "bfloat16")
    student = make_student(teacher, "silu", None, 0)
    assert student.trained["blk.0.ffn_up.weight"].dtype == torch.float32
    calibrate(student, tokens, 0.4)
    outcome = add_gradients(student, tokens, 0.4, len(tokens))
    exact = student_of(bench)
    exact.set_thresholds(list(student.thresholds))
    expected = add_gradients(exact, tokens, 0.4, len(tokens))
    torch.testing.assert_close(outcome.divergence, expected.divergence, rtol=0.1, atol=0)
    torch.testing.assert_close(outcome.share, expected.share, rtol=0.02, atol=0)


def test_thresholds_let_the_wanted_share_fire(bench: Bench, tokens: torch.Tensor) -> None:
    student = student_of(bench)
    calibrate(student, tokens, 0.25)
    share = add_gradients(student, tokens, 0.25, len(tokens)).share
    torch.testing.assert_close(share, torch.full_like(share, 0.25), atol=0.01, rtol=0)


def test_quantiles() -> None:
    magnitudes = torch.arange(1.0, 11)[torch.randperm(10)].expand(2, 10)
    assert quantiles(magnitudes, 0.3).tolist() == [8, 8]  # 8, 9 and 10 reach it
    assert quantiles(magnitudes, 1.0).tolist() == [0, 0]
