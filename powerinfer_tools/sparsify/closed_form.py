"""The start for relu, fatrelu and drelu: each layer's down matrix refitted to the teacher's FFN output.

A ridge regression in which every token counts the same: errors are relative to the token's output.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from powerinfer_tools.progress import Progress
from powerinfer_tools.reference import Layer
from powerinfer_tools.sparsify.model import Student, StudentFfn

RIDGE = 1e-3  # pull towards the teacher's matrix, in units of the mean neuron's energy
BATCH_TOKENS = 2048


@torch.no_grad()
def refit(student: Student, tokens: Tensor, show: Progress) -> list[tuple[float, float]]:
    """Refits all layers on windows tokens [b, n]; returns each one's relative error before and after.

    The teacher's stream passes layer by layer: memory holds that stream and one layer's sums.
    """
    teacher = student.teacher
    step = max(1, BATCH_TOKENS // tokens.shape[1])
    errors = []
    with teacher.precision():
        stream = torch.cat([teacher.embed(part) for part in torch.split(tokens, step)])
        for i, layer in enumerate(teacher.layers):
            errors.append(_refit_layer(layer, student.layers[i].ffn, stream, step))
            show("closed form, layers", i + 1, len(teacher.layers))
    return errors


def _refit_layer(layer: Layer, ffn: StudentFfn, stream: Tensor, step: int) -> tuple[float, float]:
    """Fits one layer and moves `stream` behind it."""
    n_ff = ffn.down.weight.shape[1]
    gram = torch.zeros(n_ff, n_ff, dtype=torch.float64, device=stream.device)
    missing = torch.zeros(n_ff, ffn.down.weight.shape[0], dtype=torch.float64, device=stream.device)
    before = 0.0
    for h, target, weight in _passed(layer, ffn, stream, step):
        residual = (target - ffn.down(h)).float()  # what the teacher's own matrix leaves
        gram += (h.T * weight) @ h
        missing += (h.T * weight) @ residual
        before += float((residual.square().sum(-1) * weight).sum())
    ridge = RIDGE * gram.diagonal().mean().clamp(min=1e-12)
    regular = gram + ridge * torch.eye(n_ff, dtype=gram.dtype, device=gram.device)
    change = torch.linalg.solve(regular, missing)  # [n_ff, n_embd]
    # the error after: |r - D h|^2 summed is before - 2 <D, missing> + <D, gram D>
    after = before - 2 * float((change * missing).sum()) + float((change * (gram @ change)).sum())
    ffn.down.weight += change.T.to(ffn.down.weight.dtype)
    n_tokens = stream.shape[0] * stream.shape[1]
    return before / n_tokens, max(0.0, after) / n_tokens


def _passed(layer: Layer, ffn: StudentFfn, stream: Tensor, step: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The student's h, the teacher's FFN output and each token's weight, [tokens, ..]; the stream moves on."""
    for part in torch.split(stream, step):
        hidden, x = layer.attention(part)
        target = layer.ffn(x)
        part.copy_(hidden + target)
        h = ffn.neurons(x)[-1].flatten(0, 1).float()
        target = target.flatten(0, 1).float()
        yield h, target, 1 / (target.square().sum(-1) + 1e-12)
