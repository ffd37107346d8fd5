"""Where an artifact came from: digests of its inputs, the tool, the arguments; and that the inputs belong together."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from powerinfer_tools import __version__
from powerinfer_tools.artifact.layout import MODE_NAMES, LayerPlan
from powerinfer_tools.checkpoint.source import Checkpoint
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.files import canonical_json, require_same, sha256_bytes

if TYPE_CHECKING:
    from powerinfer_tools.activations import Activations
    from powerinfer_tools.placement import Placement
    from powerinfer_tools.predictors import Predictors


def check_predictors(activations: "Activations", predictors: "Predictors") -> str:
    """Predictors must be made from these activations. Returns what makes others."""
    remedy = f"train them anew: powerinfer train --activations {activations.path}"
    require_same("activations file", predictors.path, activations.digest, predictors.activations_digest, remedy)
    return remedy


def check_inputs(
    activations: "Activations", predictors: "Predictors | None", placement: "Placement | None", quant: str
) -> None:
    """Predictors and placement must be made for this artifact; that the activations are, apply() checks."""
    if predictors is not None:
        remedy = check_predictors(activations, predictors)
        if predictors.quant != quant:  # their thresholds hold for weights rounded to that type
            raise PowerinferError(
                f"{predictors.path}: trained for --quant {predictors.quant}, found {quant}; {remedy} --quant {quant}",
                "mismatch",
            )
    if placement is not None:
        _check_same("activations", activations.digest, placement.inputs.get("activations", "none"))
        if predictors is not None and "predictors" in placement.inputs:
            _check_same("predictors", predictors.digest, placement.inputs["predictors"])
        _check_same("quant", quant, placement.quant)


def _check_same(what: str, expected: str, found: str) -> None:
    if expected != found:
        raise PowerinferError(
            f"placement: made for other {what}: expected {expected[:12]}, found {found[:12]}; "
            "place anew with: powerinfer place",
            "mismatch",
        )


def placement_digest(placement: "Placement") -> str:
    """Of what the placement says."""
    return sha256_bytes(canonical_json(asdict(placement)).encode())


def describe(
    checkpoint: Checkpoint,
    activations: "Activations",
    predictors: "Predictors | None",
    placement: "Placement | None",
    plans: list[LayerPlan],
    arguments: dict[str, Any],
) -> dict[str, Any]:
    """What the artifact records of its making. Names no path: the same inputs give the same bytes on any machine."""
    inputs = {"checkpoint": checkpoint.digest(), **checkpoint.inputs, "activations": activations.digest}
    if predictors is not None:
        inputs["predictors"] = predictors.digest
    if placement is not None:
        inputs["placement"] = placement_digest(placement)
    return {
        "tool": f"powerinfer {__version__}",
        "inputs": inputs,
        "arguments": arguments,
        "calibration_tokens": activations.n_tokens,
        "modes": [MODE_NAMES[plan.mode] for plan in plans],
        "predictors": predictors.figures if predictors is not None else [],
    }
