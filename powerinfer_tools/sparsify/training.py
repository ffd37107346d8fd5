"""The training loop: steps of whole windows, saved so that a killed run goes on and ends in the same bits."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.files import read_table, write_table
from powerinfer_tools.sparsify.documents import Mixture
from powerinfer_tools.sparsify.loss import LAYER_WEIGHT, Outcome, add_gradients
from powerinfer_tools.sparsify.model import Student
from powerinfer_tools.sparsify.recipe import Recipe
from powerinfer_tools.sparsify.schedule import learning_rate, wanted_active
from powerinfer_tools.sparsify.team import Team
from powerinfer_tools.sparsify.thresholds import moved, quantiles

KIND = "sparsify state"
BETAS = (0.9, 0.95)
LARGEST_NORM = 1.0  # of all gradients together
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}  # that pass the models at once
SAVE_S = 300.0  # seconds between saved states


@dataclass(frozen=True)
class Step:
    """A finished step: tokens done of all, means over the step's tokens, and speed since this process began.

    loss: divergence and the layers' error as they are weighed; divergence: nats a token; active: share of neurons.
    """

    done: int
    total: int
    loss: float
    divergence: float
    active: float
    wanted: float
    tokens_per_s: float

    @property
    def seconds_left(self) -> float:
        return (self.total - self.done) / self.tokens_per_s


class Training:
    """A student's way through its training windows. state: file that keeps it, written by the team's lead."""

    def __init__(self, student: Student, recipe: Recipe, team: Team, state: Path) -> None:
        self.student, self.recipe, self.team, self.state = student, recipe, team, state
        self.step = 0
        self.optimiser = torch.optim.AdamW(student.trained.values(), lr=0.0, betas=BETAS, weight_decay=0.0, fused=True)
        for parameter in student.trained.values():  # as AdamW itself begins; here so that a saved state can fill them
            parameter.grad = torch.zeros_like(parameter)
            self.optimiser.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def run(self, mixture: Mixture, report: Callable[[Step], None] = lambda step: None, save_s: float = SAVE_S) -> None:
        """All steps that are left; each is reported, the state is saved every save_s seconds and at the end."""
        recipe, started, first, saved = self.recipe, time.monotonic(), self.step, time.monotonic()
        step_tokens = recipe.step_windows * recipe.window
        while self.step < recipe.n_steps:
            loss, divergence, active = self._advance(mixture)
            seconds = time.monotonic() - started
            if self.team.lead and (self.step == recipe.n_steps or time.monotonic() - saved >= save_s):
                self.save()
                saved = time.monotonic()
            report(
                Step(
                    done=self.step * step_tokens,
                    total=recipe.n_steps * step_tokens,
                    loss=loss,
                    divergence=divergence,
                    active=active,
                    wanted=wanted_active(recipe.active, self.step / recipe.n_steps),
                    tokens_per_s=(self.step - first) * step_tokens / seconds,
                )
            )

    def _advance(self, mixture: Mixture) -> tuple[float, float, float]:
        """One step; returns its loss, divergence and active share."""
        recipe, student = self.recipe, self.student
        n = recipe.step_windows
        wanted, following = (wanted_active(recipe.active, (self.step + k) / recipe.n_steps) for k in (0, 1))
        sums = torch.zeros(2 + 3 * len(student.layers), device=student.teacher.device)
        mine = range(self.step * n + self.team.rank, (self.step + 1) * n, self.team.size)
        for tokens in self._batches(mixture, mine):
            sums += len(tokens) / n * _figures(add_gradients(student, tokens, wanted, n), wanted, following)
        self.team.add([sums, *self._gradients()])
        divergence, error = sums[:2].tolist()
        active, now, then = sums[2:].reshape(3, -1).tolist()
        loss = divergence + LAYER_WEIGHT * error
        if not math.isfinite(loss):
            raise PowerinferError(f"training diverged at step {self.step + 1}: try a lower --lr", "infeasible")
        self._update(learning_rate(recipe.peak_rate, (self.step + 0.5) / recipe.n_steps))
        if recipe.to != "relu":  # relu has no threshold: other programs are to compute the same
            student.set_thresholds(moved(student.thresholds, now, then))
        self.step += 1
        return loss, divergence, sum(active) / len(active)

    def _batches(self, mixture: Mixture, numbers: range) -> Iterator[Tensor]:
        """Windows of these numbers, as many at once as the device takes."""
        device = self.student.teacher.device
        at_once = max(1, BATCH_TOKENS[device] // self.recipe.window)
        for begin in range(0, len(numbers), at_once):
            windows = np.stack([mixture.window(k) for k in numbers[begin : begin + at_once]])
            yield torch.from_numpy(windows.astype(np.int64)).to(device)

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.student.trained.values() if parameter.grad is not None]

    def _update(self, rate: float) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        torch.nn.utils.clip_grad_norm_(self.student.trained.values(), LARGEST_NORM)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=False)

    def _tensors(self) -> dict[str, Tensor]:
        """All that learning changes, by name."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.student.trained.items():
            moments = self.optimiser.state[parameter]
            tensors |= {name: parameter.detach(), f"{name}:m": moments["exp_avg"], f"{name}:v": moments["exp_avg_sq"]}
        return tensors

    def save(self) -> None:
        """Writes the state, whole or not at all."""
        header = {"step": self.step, "thresholds": self.student.thresholds}
        arrays = {name: tensor.cpu().numpy() for name, tensor in self._tensors().items()}
        write_table(self.state, KIND, header, arrays, force=True)

    def load(self) -> None:
        """Takes over the state that the lead finds, or the lead's beginning, on every process."""
        tensors = self._tensors()
        header = {"step": self.step, "thresholds": self.student.thresholds}
        if self.team.lead and self.state.exists():
            table = read_table(self.state, KIND)
            header = table.header
            for name, tensor in tensors.items():
                tensor.copy_(torch.from_numpy(table.arrays[name]))
        self.team.spread(tensors.values())
        self.step, thresholds = self.team.tell((header["step"], header["thresholds"]))
        self.student.set_thresholds(thresholds)
        for moments in self.optimiser.state.values():
            moments["step"].fill_(self.step)


def _figures(outcome: Outcome, wanted: float, following: float) -> Tensor:
    """What is averaged over a step: divergence, error; a layer each: active share, quantile now and for the next."""
    found = [quantiles(outcome.magnitudes, share).mean(1) for share in (wanted, following)]
    return torch.cat([torch.stack([outcome.divergence, outcome.error]), outcome.share, *found])
