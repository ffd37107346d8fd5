"""The other way: a model file that the first PowerInfer runs, and the counts beside it that place its neurons.

Its engine computes llama, falcon and opt with relu and bamboo, in F16 and Q4_0, and each layer through a predictor that
reads the stream; what differs from that is refused.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from powerinfer_tools.activations.file import Activations, apply
from powerinfer_tools.artifact.gguf_writer import Value, write_gguf
from powerinfer_tools.artifact.layout import ALIGNMENT, INPUT_STREAM, MODE_PREDICTOR, TensorPlan, norm_key
from powerinfer_tools.artifact.metadata import general_keys, token_list
from powerinfer_tools.artifact.provenance import check_predictors
from powerinfer_tools.artifact.pwri_tensors import Tensor, Tensors, pwri_tensors
from powerinfer_tools.artifact.weights import Array, check_range, quantise
from powerinfer_tools.checkpoint.gguf_file import PWRI
from powerinfer_tools.checkpoint.pwri_checkpoint import KEY_THRESHOLD
from powerinfer_tools.checkpoint.rope import plain_theta
from powerinfer_tools.checkpoint.source import Checkpoint
from powerinfer_tools.checkpoint.tensors import bias_shapes
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.families.opt import OFFSET
from powerinfer_tools.families.registry import by_pwri_architecture
from powerinfer_tools.files import atomic_write, check_writable
from powerinfer_tools.predictors.file import Predictors
from powerinfer_tools.progress import Progress, default_progress

QUANTS = ("f16", "q4_0")
COUNTS = "activation"  # the folder beside the model


def write_pwri(
    checkpoint: Checkpoint,
    activations: Activations,
    predictors: Predictors,
    output: Path,
    *,
    quant: str = "f16",
    force: bool = False,
    progress: Progress | None = None,
) -> None:
    """Writes `output` and the folder activation beside it. Errors: what the first PowerInfer does not compute."""
    apply(activations, checkpoint)
    check_predictors(activations, predictors)
    _check(checkpoint, quant)
    check_writable(output, force)
    folder = output.parent / COUNTS
    if folder.exists() and not force:
        raise PowerinferError(f"{folder} exists: use --force to replace it", "exists")
    threshold = _threshold(predictors, checkpoint.config.n_layer)
    metadata = _metadata(checkpoint, quant) | {KEY_THRESHOLD: threshold}
    tensors = pwri_tensors(checkpoint, predictors)
    table = _table(checkpoint, tensors, quant)
    with default_progress(progress) as show, atomic_write(output, force) as file:
        write_gguf(file, metadata, table, _reported(tensors, table, show), PWRI)
    _write_counts(activations, folder)


def _reported(tensors: Tensors, table: list[TensorPlan], show: Progress) -> Iterator[Iterator[Array]]:
    for done, plan in enumerate(table):
        yield _bytes(plan, tensors[plan.name])
        show("split, tensors", done + 1, len(table))


def _bytes(plan: TensorPlan, tensor: Tensor) -> Iterator[Array]:
    """The tensor in the file's type, in parts."""
    first_row = 0
    for numbers in tensor.parts():
        check_range(plan, plan.name, numbers, first_row)
        yield quantise(plan, numbers)
        first_row += len(numbers)


def _refuse(where: Path, expected: str, found: object) -> PowerinferError:
    return PowerinferError(f"{where}: the first PowerInfer computes {expected}, found {found}", "unsupported")


def _threshold(predictors: Predictors, n_layer: int) -> float:
    """What all logits are to reach: its file has one number for it, and no biases."""
    path = predictors.path
    for i, plan in enumerate(predictors.plans):
        if plan.mode != MODE_PREDICTOR:
            raise _refuse(path, "every layer with a predictor", f"layer {i} without")
    if predictors.input != INPUT_STREAM or not predictors.relu:
        raise _refuse(
            path,
            "predictors with relu that read the stream before the FFN's norm",
            "others: take published ones over with: powerinfer build --pretrained",
        )
    biases = np.unique(np.concatenate([predictors.weights(i)[2] for i in range(n_layer)]))
    if len(biases) != 1:
        raise _refuse(path, "predictors with one threshold for all neurons", f"{len(biases)} of them")
    return -float(biases[0])


def _check(checkpoint: Checkpoint, quant: str) -> None:
    """Errors: a model, or a type, that its engine does not compute."""
    config, path = checkpoint.config, checkpoint.path
    if quant not in QUANTS:
        raise _refuse(path, "F16 and Q4_0", f"--quant {quant}")
    known = {arch: pwri.activation for arch, pwri in by_pwri_architecture().items()}
    if known.get(config.arch) != config.activation or any(config.thresholds):
        expected = ", ".join(f"{arch} with {activation}" for arch, activation in known.items())
        raise _refuse(path, expected, f"{config.arch} with {config.activation}")
    opt, possible = config.arch == "opt", bias_shapes(config).keys()
    if checkpoint.biases & possible != (possible if opt else set()):
        raise _refuse(path, "all biases" if opt else "no biases", "another model")
    if opt and not config.tied:
        raise _refuse(path, "opt whose output matrix is its embedding", "another one")
    if config.parallel != (config.arch == "falcon"):
        raise _refuse(path, "falcon's FFN beside attention", "it behind")
    if config.n_head * config.head_dim != config.n_embd:
        raise _refuse(path, "heads that make up n_embd", "another model")


def _metadata(checkpoint: Checkpoint, quant: str) -> dict[str, Value]:
    config = checkpoint.config
    sizes: dict[str, Value] = {
        "context_length": config.n_ctx + (OFFSET if config.learned_positions else 0),
        "embedding_length": config.n_embd,
        "block_count": config.n_layer,
        "feed_forward_length": config.n_ff,
        "attention.head_count": config.n_head,
        "attention.head_count_kv": config.n_head_kv,
        norm_key(config.norm): float(config.norm_eps),
    }
    if config.rope is not None:
        theta = plain_theta(config.rope, config.head_dim)
        if theta is None:
            raise _refuse(checkpoint.path, "plain rotary positions", "others")
        sizes |= {"rope.dimension_count": config.head_dim, "rope.freq_base": theta}
    if config.parallel:
        sizes["tensor_data_layout"] = "jploski"
    keys = general_keys(checkpoint, quant) | {f"{config.arch}.{key}": value for key, value in sizes.items()}
    return keys | {"general.alignment": ALIGNMENT} | _tokenizer(checkpoint)


def _tokenizer(checkpoint: Checkpoint) -> dict[str, Value]:
    """The vocabulary as llama.cpp had it: merges of byte-level BPE, or SentencePiece's scores, which order them."""
    tokenizer, special = json.loads(checkpoint.tokenizer_json), checkpoint.special
    tokens, types = token_list(tokenizer, checkpoint.config.n_vocab)
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in tokenizer["model"]["merges"]]
    keys: dict[str, Value] = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    if tokenizer["model"].get("byte_fallback"):
        rank = {token: i for i, token in reversed([(i, left + right) for i, (left, right) in enumerate(merges)])}
        scores = np.array([-float(rank.get(token, len(merges))) for token in tokens], np.float32)
        keys |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": scores}
    else:
        keys |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": [" ".join(merge) for merge in merges]}
    if special["bos"] is not None:
        keys["tokenizer.ggml.bos_token_id"] = int(special["bos"])
    if special["eos"]:
        keys["tokenizer.ggml.eos_token_id"] = int(special["eos"][0])
    return keys


def _table(checkpoint: Checkpoint, tensors: Tensors, quant: str) -> list[TensorPlan]:
    for name, tensor in tensors.items():
        if quant == "q4_0" and len(tensor.shape) == 2 and tensor.shape[1] % 32:
            found = f"{name.removesuffix('.weight')} with rows of {tensor.shape[1]}"
            raise _refuse(checkpoint.path, "rows of whole blocks of 32 in Q4_0", found)
    return [
        TensorPlan(name, quant if len(tensor.shape) == 2 else "f32", tensor.shape[::-1])
        for name, tensor in tensors.items()
    ]


def _write_counts(activations: Activations, folder: Path) -> None:
    import torch

    folder.mkdir(exist_ok=True)
    for path in folder.glob("activation_*.pt"):  # of what was there before, maybe with more layers
        path.unlink()
    for i in range(activations.n_layer):
        with atomic_write(folder / f"activation_{i}.pt", force=True) as file:
            torch.save(torch.from_numpy(activations.counts(i)).float(), file)
