"""What a file of ours, or a checkpoint, holds: by its header, and with `check` by every byte. Renders no template."""

import json
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

from powerinfer_tools.checkpoint.config import Config
from powerinfer_tools.checkpoint.gguf_file import GGUF, PWRI, read_gguf
from powerinfer_tools.errors import PowerinferError

Description = dict[str, Any]


def describe(path: Path, check: bool = False) -> Description:
    """What `inspect --json` prints: "kind", "path", "bytes", and what that kind has; "verified" says if all was read.

    check: reads every byte and fails at the first that is wrong. Errors: no such file, of no known kind, damaged.
    """
    kind = kind_of(path)
    size = path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.iterdir() if f.is_file())
    return {"kind": kind, "path": str(path), "bytes": size, **_KINDS[kind](path, check), "verified": check}


def kind_of(path: Path) -> str:
    """artifact, checkpoint, activations, predictors, placement, machine or patch. Errors: none of these."""
    if path.is_dir():
        return "checkpoint"
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise PowerinferError(f"{path}: {error.strerror}", "usage") from error
    if start[: len(PWRI)] == PWRI:
        return "checkpoint"
    if start[: len(GGUF)] == GGUF:
        from powerinfer_tools.artifact.layout import KEY_VERSION

        return "artifact" if KEY_VERSION in read_gguf(path, strict=False).metadata else "checkpoint"
    kind = _table_kind(path) if start[8:] == b"{" else _json_kind(path)
    if kind not in _KINDS:
        raise PowerinferError(f"{path}: expected one of {', '.join(_KINDS)}, found something else", "unsupported")
    return kind


def _table_kind(path: Path) -> str:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            header = json.loads((file.metadata() or {}).get("powerinfer", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise PowerinferError(f"{path}: expected a file of powerinfer, found {error}", "malformed") from error
    return str(header.get("kind"))


def _json_kind(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = json.loads(file.read(64 << 20))
    except (OSError, ValueError, RecursionError):
        return ""
    return str(data.get("kind")) if isinstance(data, dict) else ""


def _artifact(path: Path, check: bool) -> Description:
    from powerinfer_tools.artifact.layout import MODE_NAMES
    from powerinfer_tools.artifact.read import open_artifact, verify

    if check:
        verify(path)
    artifact = open_artifact(path)
    config = artifact.config
    vram, ram = artifact.placement or ([0] * config.n_layer, [config.n_ff] * config.n_layer)
    layers = [
        {
            "layer": i,
            "mode": MODE_NAMES[plan.mode],
            "rank": plan.rank,
            "always": plan.always,
            "active_ratio": round(float(artifact.frequency(i).mean()), 4),
            "threshold": round(config.thresholds[i], 6),
            "vram": vram[i],
            "ram": ram[i] - vram[i],
            "disk": config.n_ff - ram[i],
        }
        for i, plan in enumerate(artifact.plans)
    ]
    return {
        **_config(config),
        "license": artifact.metadata.get("general.license"),
        "quant": artifact.quant,
        "chat_template": artifact.chat_template is not None,
        "data_sha256": artifact.data_sha256,
        "provenance": {k: v for k, v in artifact.provenance.items() if k not in ("modes", "predictors")},
        "part_bytes": _part_bytes({name: tensor.n_bytes for name, tensor in artifact.file.tensors.items()}),
        "layers": layers,
    }


def _config(config: Config) -> Description:
    """Sizes, and what the model has that a plain one has not."""
    names = ("name", "arch", "activation", "n_layer", "n_embd", "n_ff", "n_head", "n_head_kv", "n_vocab", "n_ctx")
    choices = ("norm", "learned_positions", "parallel", "qk_norm", "sub_norms", "softcap")
    plain = {field.name: field.default for field in fields(Config)}
    structure = {name: getattr(config, name) for name in choices if getattr(config, name) != plain[name]}
    if config.rotary:
        structure["rotary"] = f"{sum(config.rotary)} of {config.n_layer} layers"
    if config.experts is not None:
        structure["experts"] = f"{config.experts.n_used} of {config.experts.n}"
    return {name: getattr(config, name) for name in names} | structure


_PARTS = {
    "ffn_neurons": "neurons",
    "ffn_select": "selecting rows",
    "ffn_router": "routers",
    "predictor_": "predictors",
    "attn_": "attention",
    "token_embd": "embedding and output",
    "output.": "embedding and output",
}


def _part_bytes(tensors: dict[str, int]) -> dict[str, int]:
    """Bytes of tensors by what they are for."""
    total: Counter[str] = Counter()
    for name, n_bytes in tensors.items():
        short = name.split(".", 2)[2] if name.startswith("blk.") else name
        total[next((part for start, part in _PARTS.items() if short.startswith(start)), "other")] += n_bytes
    return dict(total.most_common())


def _checkpoint(path: Path, check: bool) -> Description:
    from powerinfer_tools.checkpoint import open_checkpoint
    from powerinfer_tools.checkpoint.pwri_checkpoint import PwriCheckpoint

    checkpoint = open_checkpoint(path)
    old: Description = {}
    if isinstance(checkpoint, PwriCheckpoint):
        old["convert"] = f"a model of the first PowerInfer: powerinfer build {path} -o NEW.gguf"
    if (own := checkpoint.predictors) is not None:
        old |= {"predictor_ranks": f"{min(own.ranks)} to {max(own.ranks)}", "predictor_threshold": own.threshold}
    return old | {
        **_config(checkpoint.config),
        **checkpoint.metadata,
        "tensors": len(checkpoint.names()),
        "chat_template": checkpoint.chat_template is not None,
        "notes": "; ".join(checkpoint.notes),
        "digest": checkpoint.digest() if check else None,
    }


def _activations(path: Path, check: bool) -> Description:
    from powerinfer_tools.activations.file import read_activations
    from powerinfer_tools.activations.report import report

    activations = read_activations(path)
    if check:
        for i in range(activations.n_layer):
            _check_layer(activations, i)
    found = report(activations)
    found.pop("path")
    return {"digest": activations.digest, "inputs": activations.header["inputs"], "n_ff": activations.n_ff, **found}


def _check_layer(activations: Any, i: int) -> None:
    import numpy as np

    counts, inputs, active = activations.counts(i), activations.inputs(i), activations.active(i)
    where = f"{activations.path}: layer {i}"
    if counts.shape != (activations.n_ff,) or counts.min() < 0 or counts.max() > activations.n_tokens:
        limit = activations.n_tokens
        raise PowerinferError(f"{where}: expected {activations.n_ff} counts in 0 .. {limit}, found others", "malformed")
    if not np.isfinite(inputs).all() or len(inputs) != len(active):
        raise PowerinferError(f"{where}: expected as many finite inputs as active sets, found others", "malformed")


def _predictors(path: Path, check: bool) -> Description:
    import numpy as np

    from powerinfer_tools.artifact.layout import MODE_NAMES, MODE_PREDICTOR
    from powerinfer_tools.predictors.file import read_predictors

    predictors = read_predictors(path)
    for i, plan in enumerate(predictors.plans if check else []):
        if plan.mode == MODE_PREDICTOR and not all(np.isfinite(w).all() for w in predictors.weights(i)):
            raise PowerinferError(f"{path}: layer {i}: expected finite weights, found others", "malformed")
    plans = predictors.plans
    return {
        "digest": predictors.digest,
        "inputs": predictors.header["inputs"],
        "quant": predictors.quant,
        "layers": [
            {"layer": i, **figures, "mode": MODE_NAMES[plan.mode], "rank": plan.rank, "always": plan.always}
            for i, (plan, figures) in enumerate(zip(plans, predictors.figures, strict=True))
        ],
    }


def _placement(path: Path, check: bool) -> Description:
    from dataclasses import asdict

    from powerinfer_tools.placement.file import read_placement

    placement = asdict(read_placement(path))
    n_ff, details = placement.pop("n_ff"), placement.pop("layers")
    prefixes = zip(placement.pop("vram"), placement.pop("ram"), placement.pop("dense"), strict=True)
    layers = [
        {"layer": i, "vram": k1, "ram": k2 - k1, "disk": n_ff - k2, "dense_in_vram": dense}
        for i, (k1, k2, dense) in enumerate(prefixes)
    ]
    if len(details) == len(layers):
        layers = [{**layer, **detail} for layer, detail in zip(layers, details, strict=True)]
    return {"n_ff": n_ff, **placement, "layers": layers}


def _machine(path: Path, check: bool) -> Description:
    from dataclasses import asdict

    from powerinfer_tools.placement.machine import read_machine

    machine = read_machine(path)
    return {"digest": machine.digest, **asdict(machine)}


def _patch(path: Path, check: bool) -> Description:
    from powerinfer_tools.checkpoint.patch import check_numbers, read_patch

    table = read_patch(path)
    if check:
        check_numbers(path, table)
    names = ("inputs", "model", "activation", "thresholds")
    ranks = {table.arrays[name].shape[1] for name in table.arrays if name.endswith(".a")}
    return {
        "digest": table.digest,
        **{name: table.header[name] for name in names},
        "rank": max(ranks, default=0),
        "tensors": len(table.arrays),
    }


_KINDS = {
    "artifact": _artifact,
    "checkpoint": _checkpoint,
    "activations": _activations,
    "predictors": _predictors,
    "placement": _placement,
    "machine": _machine,
    "patch": _patch,
}
