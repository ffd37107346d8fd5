"""The refitted down matrix is the ridge regression's, and nearer to the teacher."""

import pytest
import torch

from powerinfer_tools.progress import silent
from powerinfer_tools.sparsify.closed_form import refit
from powerinfer_tools.sparsify.model import Student, load_teacher, make_student
from tests.sparsify.conftest import Bench


def layer_errors(student: Student, tokens: torch.Tensor) -> list[float]:
    """Mean relative squared error of each layer's FFN output on the teacher's stream."""
    teacher, errors = student.teacher, []
    hidden = teacher.embed(tokens)
    with torch.no_grad():
        for layer, own in zip(teacher.layers, student.layers, strict=True):
            after, x = layer.attention(hidden)
            target = layer.ffn(x)
            errors.append(float(((own.ffn(x)[0] - target).square().sum(-1) / target.square().sum(-1)).mean()))
            hidden = after + target
    return errors


@pytest.mark.parametrize("activation", ["relu", "drelu"])
def test_refit_brings_each_layer_nearer(bench: Bench, activation: str) -> None:
    student = make_student(load_teacher(bench.checkpoint, "cpu", "float32"), activation, None, 0)
    tokens = torch.randint(300, (32, 64), generator=torch.Generator().manual_seed(1))
    before = layer_errors(student, tokens)
    reported = refit(student, tokens, silent)
    after = layer_errors(student, tokens)
    torch.testing.assert_close(torch.tensor(reported), torch.tensor([before, after]).T, rtol=1e-3, atol=1e-5)
    assert all(new < 0.6 * old for new, old in zip(after, before, strict=True))
    others = torch.randint(300, (8, 64), generator=torch.Generator().manual_seed(2))
    fresh = make_student(student.teacher, activation, None, 0)
    assert all(a < b for a, b in zip(layer_errors(student, others), layer_errors(fresh, others), strict=True))
