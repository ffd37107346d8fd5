"""build(): profile, train, place and split in one call; resumes, and skips what is up to date."""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from powerinfer_tools.activations import (
    Activations,
    apply,
    counts_digest,
    profile,
    read_activations,
    take_counts,
)
from powerinfer_tools.artifact import Artifact, open_artifact, split
from powerinfer_tools.artifact.layout import MODE_GATE, MODE_PREDICTOR, LayerPlan, tensor_table
from powerinfer_tools.checkpoint import Checkpoint, Config, open_checkpoint
from powerinfer_tools.checkpoint.pwri_checkpoint import PwriCheckpoint
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.files import check_writable, locked, sha256_file
from powerinfer_tools.placement import (
    Machine,
    Placement,
    cached_machine,
    let_through,
    place,
    read_placement,
    write_placement,
)
from powerinfer_tools.predictors import (
    Predictors,
    Pretrained,
    open_pretrained,
    read_predictors,
    take_predictors,
    train,
)
from powerinfer_tools.progress import Progress

SMALL_MODEL = 10**9  # parameters below which q4_0 costs more quality than its bytes are worth
WINDOW = 512  # tokens of a calibration window
CTX_SIZE = 4096  # tokens of context that memory is placed for, unless it is said otherwise

T = TypeVar("T")


@dataclass(frozen=True)
class Stage:
    """One finished stage: its file, its seconds, whether the file was there already, and the result in words."""

    name: str
    path: Path
    seconds: float
    up_to_date: bool
    summary: str


@dataclass(frozen=True)
class Source:
    """What a build is made from. counts: a folder of firing counts, instead of a corpus; pretrained: predictors to be
    taken over, instead of trained ones; both are the first PowerInfer's.
    """

    checkpoint: Checkpoint
    corpus: list[Path]
    counts: Path | None
    pretrained: Pretrained | None


@dataclass(frozen=True)
class Recipe:
    """The arguments that decide what a build makes."""

    quant: str
    sparsity: float | None
    n_tokens: int
    recall: float
    error: float
    top1: float
    perplexity: float
    ram: int | None
    ctx_size: int
    seed: int


def build(
    model: Path,
    corpus: list[Path],
    output: Path,
    *,
    activation: str | None = None,
    patch: Path | None = None,
    counts: Path | None = None,
    pretrained: Path | None = None,
    quant: str = "auto",
    sparsity: float | None = None,
    n_tokens: int = 32768,
    recall: float = 0.98,
    error: float = 0.02,
    top1: float = 0.98,
    perplexity: float = 0.005,
    ram: int | None = None,
    ctx_size: int | None = None,
    machine: Machine | None = None,
    seed: int = 0,
    keep: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    report: Callable[[Stage], None] = lambda stage: None,
    note: Callable[[str], None] = lambda text: None,
) -> Artifact:
    """Makes the artifact `output` from the checkpoint `model`, with what `patch` changes of it, and returns it.

    A killed build goes on where it stopped; an artifact of the same recipe is left as it is. The files between the
    stages lie in a hidden folder until the artifact is done; with `keep`, beside it, as output.activations, .predictors
    and .placement. quant auto: q8_0 below 10^9 parameters, else q4_0. report is called after each stage,
    note with what a user should know of the checkpoint.
    counts, instead of a corpus, and pretrained predictors are the first PowerInfer's: the model's own are taken where
    none are named, and quant auto keeps a PWRI file's type.
    Errors: those of the stages; `output`, or with `keep` a file of a stage, is of another recipe and not `force`.
    """
    checkpoint = open_checkpoint(model, activation, patch)
    for text in checkpoint.notes:
        note(text)
    source = _source(checkpoint, corpus, counts, pretrained)
    if quant == "auto":
        quant = kept_quant(checkpoint) or default_quant(checkpoint.config)
    ctx_size = min(ctx_size or CTX_SIZE, checkpoint.config.n_ctx)
    recipe = Recipe(quant, sparsity, n_tokens, recall, error, top1, perplexity, ram, ctx_size, seed)
    arguments = _arguments(recipe, source)
    if output.exists() and not force:
        return _built_before(checkpoint, output, arguments, report)
    check_writable(output, force)
    with locked(output), _stage_files(output, keep) as base:
        stages = _Stages(source, output, recipe, base, force or not keep, progress, report)
        return stages.split(arguments, force, machine)


def default_quant(config: Config) -> str:
    """What `auto` stands for."""
    return "q8_0" if n_parameters(config) < SMALL_MODEL else "q4_0"


def kept_quant(checkpoint: Checkpoint) -> str | None:
    """The type of a PWRI file's neurons, where an artifact can have it, too."""
    return checkpoint.quant if isinstance(checkpoint, PwriCheckpoint) else None


def n_parameters(config: Config) -> int:
    """The model's weights, biases left out."""
    table = tensor_table(config, [LayerPlan(MODE_GATE)] * config.n_layer, "f32", frozenset())
    return sum(plan.n_bytes // 4 for plan in table if len(plan.shape) > 1)


def _source(checkpoint: Checkpoint, corpus: list[Path], counts: Path | None, pretrained: Path | None) -> Source:
    """What is to be used, also the model's own predictors and the counts beside a PWRI file. Errors: nothing counts."""
    for path in corpus:
        if not path.is_file():
            raise PowerinferError(f"{path}: no such file", "usage")
    published = isinstance(checkpoint, PwriCheckpoint)
    beside = checkpoint.path.parent / "activation"
    if published and not corpus and counts is None and beside.is_dir():
        counts = beside
    if bool(corpus) == (counts is not None):
        found = "both" if corpus else f"neither, and no folder {beside}" if published else "neither"
        raise PowerinferError(
            f"{checkpoint.path}: expected --corpus FILE, a text to count firing neurons on, or --counts FOLDER, counts "
            f"of the first PowerInfer; found {found}",
            "usage",
        )
    if pretrained is None and checkpoint.predictors is not None:
        pretrained = checkpoint.path
    taken = open_pretrained(pretrained, checkpoint) if pretrained is not None else None
    return Source(checkpoint, corpus, counts, taken)


def _arguments(recipe: Recipe, source: Source) -> dict[str, Any]:
    config, counts, pretrained = source.checkpoint.config, source.counts, source.pretrained
    return {
        **vars(recipe),
        "corpus": [sha256_file(path) for path in source.corpus],
        "counts": counts_digest(counts, config.n_layer) if counts is not None else None,
        "pretrained": pretrained.digest if pretrained is not None else None,
    }


def _built_before(
    checkpoint: Checkpoint, output: Path, arguments: dict[str, Any], report: Callable[[Stage], None]
) -> Artifact:
    """The artifact that is there already, if it is the one that this build would make."""
    artifact = open_artifact(output)
    found = artifact.provenance.get("arguments", {})
    differing = [key for key in arguments if key not in found or found[key] != arguments[key]]
    if artifact.provenance.get("inputs", {}).get("checkpoint") != checkpoint.digest():
        differing.insert(0, "checkpoint")
    if differing:
        raise PowerinferError(
            f"{output} exists, built with another {', '.join(differing)}: use --force to replace it", "exists"
        )
    report(Stage("split", output, 0.0, True, _describe_artifact(artifact)))
    return artifact


@contextmanager
def _stage_files(output: Path, keep: bool) -> Iterator[Path]:
    """Yields the path to which stages append their suffix; without `keep` it lies in a folder that goes at the end."""
    if keep:
        yield output.with_suffix("")
        return
    folder = output.with_name(f".{output.name}.build")
    folder.mkdir(exist_ok=True)
    yield folder / output.stem
    shutil.rmtree(folder)


@dataclass(frozen=True)
class _Stages:
    """The stages of one build, each asking for the one before."""

    source: Source
    output: Path
    recipe: Recipe
    base: Path
    replace: bool
    progress: Progress | None
    report: Callable[[Stage], None]

    @property
    def checkpoint(self) -> Checkpoint:
        return self.source.checkpoint

    def split(self, arguments: dict[str, Any], force: bool, machine: Machine | None) -> Artifact:
        """Runs all stages."""
        activations = self.profile() if self.source.counts is None else self.count(self.source.counts)
        apply(activations, self.checkpoint)
        predictors = self.train(activations)
        placement = self.place(activations, predictors, machine)
        started = time.monotonic()
        artifact = split(
            self.checkpoint,
            activations,
            self.output,
            predictors=predictors,
            placement=placement,
            quant=self.recipe.quant,
            arguments=arguments,
            force=force,
            progress=self.progress,
        )
        self.report(Stage("split", self.output, time.monotonic() - started, False, _describe_artifact(artifact)))
        return artifact

    def profile(self) -> Activations:
        from powerinfer_tools.activations.corpus import calibration_windows

        recipe, config = self.recipe, self.checkpoint.config
        window = min(WINDOW, config.n_ctx)
        wanted = {
            "inputs": {"checkpoint": self.checkpoint.digest()},
            "corpus": [sha256_file(path) for path in self.source.corpus],
            "n_tokens": calibration_windows(self.checkpoint, self.source.corpus, recipe.n_tokens, window).size,
            "window": window,
            "sparsity": recipe.sparsity,
            "seed": recipe.seed,
        }

        def found(activations: Activations) -> dict[str, Any]:
            return activations.header | {"corpus": [text["sha256"] for text in activations.header["corpus"]]}

        def make(path: Path) -> Activations:
            return profile(
                self.checkpoint,
                self.source.corpus,
                path,
                n_tokens=recipe.n_tokens,
                sparsity=recipe.sparsity,
                window=window,
                seed=recipe.seed,
                force=self.replace,
                progress=self.progress,
            )

        return self.stage("profile", ".activations", read_activations, wanted, found, make, _describe_activations)

    def count(self, folder: Path) -> Activations:
        digest = counts_digest(folder, self.checkpoint.config.n_layer)
        wanted = {"inputs": {"checkpoint": self.checkpoint.digest(), "counts": digest}}

        def found(activations: Activations) -> dict[str, Any]:
            return activations.header

        def make(path: Path) -> Activations:
            return take_counts(self.checkpoint, folder, path, self.replace)

        return self.stage("counts", ".activations", read_activations, wanted, found, make, _describe_counts)

    def train(self, activations: Activations) -> Predictors | None:
        """None for a model that is never exactly sparse: all its layers run in mode gate; and for one that is known by
        its counts alone, if it comes without predictors."""
        if self.source.pretrained is not None:
            return self.take_over(activations, self.source.pretrained)
        if not self.checkpoint.config.exactly_sparse or self.source.counts is not None:
            return None
        recipe = self.recipe
        options = {key: getattr(recipe, key) for key in ("recall", "error", "top1", "perplexity", "quant", "seed")}
        inputs = {"checkpoint": activations.checkpoint_digest, "activations": activations.digest}

        def make(path: Path) -> Predictors:
            return train(self.checkpoint, activations, path, **options, force=self.replace, progress=self.progress)

        def found(predictors: Predictors) -> dict[str, Any]:
            return predictors.header

        wanted = {"inputs": inputs, **options}
        return self.stage("train", ".predictors", read_predictors, wanted, found, make, _describe_predictors)

    def take_over(self, activations: Activations, pretrained: Pretrained) -> Predictors:
        quant, digest = self.recipe.quant, pretrained.digest
        inputs = {"checkpoint": activations.checkpoint_digest, "activations": activations.digest, "pretrained": digest}

        def make(path: Path) -> Predictors:
            return take_predictors(self.checkpoint, activations, pretrained, path, quant=quant, force=self.replace)

        def found(predictors: Predictors) -> dict[str, Any]:
            return predictors.header

        wanted = {"inputs": inputs, "quant": quant}
        return self.stage("predictors", ".predictors", read_predictors, wanted, found, make, _describe_predictors)

    def place(self, activations: Activations, predictors: Predictors | None, machine: Machine | None) -> Placement:
        recipe, config = self.recipe, self.checkpoint.config
        inputs = {"checkpoint": activations.checkpoint_digest}
        if predictors is not None:
            inputs["predictors"] = predictors.digest
        wanted: dict[str, Any] = {
            "inputs": inputs | {"activations": activations.digest} | ({"machine": machine.digest} if machine else {}),
            "quant": recipe.quant,
            "ctx_size": recipe.ctx_size,
        }
        if recipe.ram is not None:
            wanted["ram"] = recipe.ram

        def found(placement: Placement) -> dict[str, Any]:
            kept = {key: placement.inputs[key] for key in wanted["inputs"] if key in placement.inputs}
            return vars(placement) | {"inputs": kept, "ram": placement.budgets.get("ram")}

        def make(path: Path) -> Placement:
            placement = place(
                config,
                activations,
                predictors.plans if predictors is not None else [LayerPlan(MODE_GATE)] * config.n_layer,
                quant=recipe.quant,
                head=self.checkpoint.head_type(recipe.quant),
                biases=self.checkpoint.biases,
                ctx_size=recipe.ctx_size,
                machine=machine or cached_machine(self.output.resolve().parent),
                ram=recipe.ram,
                let_through=let_through(predictors.plans, predictors.figures) if predictors is not None else None,
                inputs=inputs,
            )
            write_placement(placement, path, self.replace)
            return placement

        return self.stage("place", ".placement", read_placement, wanted, found, make, _describe_placement)

    def stage(
        self,
        name: str,
        suffix: str,
        read: Callable[[Path], T],
        wanted: dict[str, Any],
        found: Callable[[T], dict[str, Any]],
        make: Callable[[Path], T],
        describe: Callable[[T], str],
    ) -> T:
        """The stage's file, made where there is none that holds what is `wanted`; reported either way."""
        path, started = self.base.with_name(self.base.name + suffix), time.monotonic()
        if path.exists():
            value = read(path)
            differing = [key for key in wanted if found(value).get(key) != wanted[key]]
            if not differing:
                self.report(Stage(name, path, time.monotonic() - started, True, describe(value)))
                return value
            if not self.replace:
                raise PowerinferError(
                    f"{path} exists, made with another {', '.join(differing)}: use --force to replace it", "exists"
                )
        value = make(path)
        self.report(Stage(name, path, time.monotonic() - started, False, describe(value)))
        return value


def _describe_activations(activations: Activations) -> str:
    share = sum(float(activations.frequency(i).mean()) for i in range(activations.n_layer)) / activations.n_layer
    return f"{share:.1%} of the neurons fire for a token, over {activations.n_tokens} tokens"


def _describe_counts(activations: Activations) -> str:
    return f"taken over, of {activations.n_tokens} tokens if the most frequent neuron fires for each"


def _describe_predictors(predictors: Predictors) -> str:
    n, dropped = sum(plan.mode == MODE_PREDICTOR for plan in predictors.plans), len(predictors.loss["dropped"])
    gates = f"{len(predictors.plans) - n} in mode gate" + (f", {dropped} of them for accuracy" if dropped else "")
    return f"{n} layers with a predictor, {gates}"


def _describe_placement(placement: Placement) -> str:
    return f"{placement.expected_ms:.2f} ms a token expected"


def _describe_artifact(artifact: Artifact) -> str:
    return f"{artifact.quant}, {sum(mode == MODE_PREDICTOR for mode in artifact.modes)} layers with a predictor"
