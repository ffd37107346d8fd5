"""sparsify(): a dense model to an exactly sparse one that it teaches itself."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from powerinfer_tools.checkpoint import Checkpoint, Merged, open_checkpoint
from powerinfer_tools.checkpoint.patch import write_patch
from powerinfer_tools.files import atomic_write, canonical_json, sha256_file
from powerinfer_tools.progress import Progress, default_progress, silent
from powerinfer_tools.sparsify.closed_form import refit
from powerinfer_tools.sparsify.documents import Ids, Mixture, Source, make_source, read_documents
from powerinfer_tools.sparsify.evaluation import Quality, evaluate
from powerinfer_tools.sparsify.model import Student, choose_precision, load_teacher, make_student
from powerinfer_tools.sparsify.recipe import Recipe, check
from powerinfer_tools.sparsify.schedule import wanted_active
from powerinfer_tools.sparsify.self_generation import make_frame, self_generate, write_chats
from powerinfer_tools.sparsify.team import Team, joined
from powerinfer_tools.sparsify.thresholds import calibrate
from powerinfer_tools.sparsify.training import SAVE_S, Step, Training
from powerinfer_tools.sparsify.write import base_config, stored_names, write_folder
from powerinfer_tools.tokens import Tokenizer
from powerinfer_tools.work import resumable

SELF = "self-generated"
CALIBRATION_WINDOWS = 4
FIT_TOKENS = 20480  # that a closed-form start is fitted to
EVAL_TOKENS = 16384  # held out, of all sources together


@dataclass(frozen=True)
class Result:
    """What was written, and how both models do on the same held-out texts. patch, chats: None where not asked for."""

    output: Path
    patch: Path | None
    chats: Path | None
    teacher: Quality
    student: Quality

    @property
    def ratio(self) -> float:
        """The student's perplexity over its teacher's."""
        return self.student.perplexity["all"] / self.teacher.perplexity["all"]


def sparsify(
    checkpoint: Checkpoint,
    corpus: list[Path],
    output: Path,
    recipe: Recipe | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
    report: Callable[[Step], None] = lambda step: None,
    save_s: float = SAVE_S,
) -> Result | None:
    """Trains an exactly sparse student of `checkpoint` and writes it to the folder `output`.

    With a rank, output.patch.safetensors beside it holds what was learnt; with self_tokens, output.chats.jsonl the
    chats. A killed run goes on at its last saved state, save_s seconds back at most. Under torchrun all processes
    train together; only the first reports and has a result. Errors: those of check; a corpus too short; a GGUF model
    that no config.json describes; output exists without `force`.
    """
    recipe = recipe or Recipe()
    check(recipe, checkpoint)
    base_config(checkpoint)  # this and the next refuse at once what could not be written in the end
    stored_names(checkpoint)
    with joined() as team:
        precision = team.tell(choose_precision(recipe.precision, team.device))
        fingerprint = _fingerprint(checkpoint, corpus, recipe, precision)
        shown = progress if team.lead else silent
        with _work(output, fingerprint, force, team) as folder, default_progress(shown) as show:
            run = _Run(checkpoint, recipe, team, folder, show)
            student, sources = run.train(corpus, precision, report, save_s, beside(output, ".chats.jsonl"))
            return run.finish(student, sources, output, fingerprint) if team.lead else None


def beside(output: Path, suffix: str) -> Path:
    """The file of that suffix that belongs to `output`."""
    return output.with_name(output.name + suffix)


def _fingerprint(checkpoint: Checkpoint, corpus: list[Path], recipe: Recipe, precision: str) -> dict[str, Any]:
    documents = [{"name": path.name, "sha256": sha256_file(path)} for path in corpus if path.is_file()]
    return {"checkpoint": checkpoint.digest(), "corpus": documents, **asdict(recipe), "precision": precision}


@contextmanager
def _work(output: Path, fingerprint: dict[str, Any], force: bool, team: Team) -> Iterator[Path]:
    """The folder of unfinished work; only the lead has one."""
    if not team.lead:
        yield output
        return
    with resumable(output, fingerprint, force) as folder:
        yield folder


@dataclass(frozen=True)
class _Run:
    """One run's parts."""

    checkpoint: Checkpoint
    recipe: Recipe
    team: Team
    folder: Path
    show: Progress

    def train(
        self, corpus: list[Path], precision: str, report: Callable[[Step], None], save_s: float, chats: Path
    ) -> tuple[Student, list[Source]]:
        """The trained student, and the sources that it was trained on."""
        recipe, team, checkpoint = self.recipe, self.team, self.checkpoint
        tokenizer = Tokenizer(checkpoint.tokenizer_json, checkpoint.special)
        template, window = checkpoint.chat_template, recipe.window
        sources = [make_source(str(path), read_documents(path), tokenizer, template, window) for path in corpus]
        frame = make_frame(checkpoint, tokenizer) if recipe.self_tokens else None
        teacher = load_teacher(checkpoint, team.device, precision)
        student = make_student(teacher, recipe.activation, recipe.rank, recipe.seed)
        texts, own = np.concatenate([source.training for source in sources]), np.empty((0, window), np.int32)
        if frame is not None:
            options: dict[str, Any] = {"n_tokens": recipe.self_tokens, "seed": recipe.seed}
            written = self_generate(teacher, tokenizer, frame, self.folder, **options, team=team, show=self.show)
            if team.lead:
                write_chats(chats, written)
            sources.append(make_source(SELF, list(written), tokenizer, template, window))
            own = sources[-1].training
        mixture = Mixture(texts, own, recipe.chat_share, recipe.seed)
        training = Training(student, recipe, team, self.folder / "state")
        if team.lead and not training.state.exists():
            self._begin(student, mixture, len(texts) + len(own))
            training.save()
        training.load()
        training.run(mixture, report if team.lead else lambda step: None, save_s)
        return student, sources

    def _begin(self, student: Student, mixture: Mixture, n_windows: int) -> None:
        """The closed form where the activation is another one, then the first thresholds."""
        recipe, device = self.recipe, self.team.device

        def windows(n: int) -> torch.Tensor:
            chosen = np.stack([mixture.window(k) for k in range(min(n, n_windows))])
            return torch.from_numpy(chosen.astype(np.int64)).to(device)

        if recipe.to != "cut":
            refit(student, windows(max(1, FIT_TOKENS // recipe.window)), self.show)
        if recipe.to != "relu":
            calibrate(student, windows(CALIBRATION_WINDOWS), wanted_active(recipe.active, 0.0))

    def finish(self, student: Student, sources: list[Source], output: Path, fingerprint: dict[str, Any]) -> Result:
        """Writes everything and evaluates what was written."""
        recipe = self.recipe
        merged = Merged(self.checkpoint, recipe.activation, student.thresholds, learnt_changes(student))
        patch = beside(output, ".patch.safetensors") if recipe.rank else None
        if patch is not None:
            write_patch(patch, merged, force=True)
        folder = self.folder / "model"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write_folder(self.checkpoint, merged, folder)
        held_out = {source.name: _spread(source.held_out, recipe.window, len(sources)) for source in sources}
        teacher, learnt = (
            evaluate(model, held_out, self.team.device, self.show, what)
            for model, what in (
                (self.checkpoint, "evaluate the teacher, layers"),
                (open_checkpoint(folder), "evaluate the student, layers"),
            )
        )
        with atomic_write(folder / "sparsify.json") as file:
            file.write(canonical_json(fingerprint | {"teacher": vars(teacher), "student": vars(learnt)}).encode())
        if output.exists():
            shutil.rmtree(output)
        os.replace(folder, output)
        return Result(output, patch, beside(output, ".chats.jsonl") if recipe.self_tokens else None, teacher, learnt)


def learnt_changes(student: Student) -> dict[str, np.ndarray[Any, Any]]:
    """What was learnt, by name; patches as float16, in which they are shipped and evaluated."""
    return {
        name: (weight.detach().half() if name.endswith((".a", ".b")) else weight.detach()).cpu().numpy()
        for name, weight in student.trained.items()
    }


def _spread(windows: Ids, window: int, n_sources: int) -> Ids:
    """Evenly spread windows, so many that all sources together have EVAL_TOKENS."""
    n = min(len(windows), max(1, EVAL_TOKENS // n_sources // window))
    return windows[np.arange(n) * len(windows) // n]
