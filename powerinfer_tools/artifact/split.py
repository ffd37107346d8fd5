"""Checkpoint, activations and predictors → the artifact, one tensor at a time."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from powerinfer_tools.artifact.gguf_writer import header_bytes, offsets, write_gguf
from powerinfer_tools.artifact.layout import MODE_GATE, QUANTS, LayerPlan, TensorPlan, tensor_table
from powerinfer_tools.artifact.metadata import artifact_metadata
from powerinfer_tools.artifact.provenance import check_inputs, describe
from powerinfer_tools.artifact.read import Artifact, open_artifact
from powerinfer_tools.artifact.weights import Array, Weights
from powerinfer_tools.checkpoint.source import Checkpoint
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.files import atomic_write, check_writable
from powerinfer_tools.progress import Progress, default_progress

if TYPE_CHECKING:
    from powerinfer_tools.activations import Activations
    from powerinfer_tools.placement import Placement
    from powerinfer_tools.predictors import Predictors


def split(
    checkpoint: Checkpoint,
    activations: "Activations",
    output: Path,
    *,
    predictors: "Predictors | None" = None,
    placement: "Placement | None" = None,
    quant: str = "q4_0",
    arguments: dict[str, Any] | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Writes the artifact to `output` and returns it, opened. Without predictors all layers run in mode gate.

    Same inputs, same bytes. Holds one matrix in float32 and one layer's quantised neurons at a time. arguments: what
    the provenance records beside the digests.
    Errors: inputs that were not made from each other; a weight that is not finite; `output` exists and not `force`;
    no space.
    """
    from powerinfer_tools.activations import apply

    if quant not in QUANTS:
        raise PowerinferError(f"quant: expected one of {', '.join(QUANTS)}, found {quant}", "usage")
    check_writable(output, force)
    apply(activations, checkpoint)
    check_inputs(activations, predictors, placement, quant)
    config = checkpoint.config
    plans = predictors.plans if predictors is not None else [LayerPlan(MODE_GATE)] * config.n_layer
    table = tensor_table(config, plans, quant, checkpoint.biases, checkpoint.head_type(quant))
    metadata = artifact_metadata(
        checkpoint,
        plans,
        quant,
        predictors,
        (placement.vram, placement.ram) if placement is not None else None,
        describe(checkpoint, activations, predictors, placement, plans, {"quant": quant, **(arguments or {})}),
    )
    check_space(output, header_bytes(metadata, table) + offsets(table)[-1])
    weights = Weights(checkpoint, activations, predictors, plans)
    with default_progress(progress) as report, atomic_write(output, force) as file:
        write_gguf(file, metadata, table, _reported(weights, table, report))
    return open_artifact(output)


def check_space(output: Path, n_bytes: int) -> None:
    """Fails before the work where the output's disk has no room for it."""
    free = shutil.disk_usage(output.resolve().parent).free
    if free < n_bytes:
        raise PowerinferError(f"{output}: needs {n_bytes} bytes, found {free} free", "io")


def _reported(weights: Weights, table: list[TensorPlan], report: Progress) -> Iterator[Iterator[Array]]:
    for done, plan in enumerate(table):
        report("split, tensors", done, len(table))
        yield weights.blocks(plan)
    report("split, tensors", len(table), len(table))
