"""The other way: a model file that the first PowerInfer runs, and the counts beside it that place its neurons.

Its engine computes llama with relu and bamboo (falcon and opt are not written here), in F16 and Q4_0, and each layer
through a predictor that reads the stream; what differs from that is refused.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from powerinfer_tools.activations.file import Activations, apply
from powerinfer_tools.artifact.gguf_writer import Value, write_gguf
from powerinfer_tools.artifact.layout import ALIGNMENT, INPUT_STREAM, MODE_PREDICTOR, TensorPlan
from powerinfer_tools.artifact.metadata import general_keys, token_list
from powerinfer_tools.artifact.weights import Array, FloatArray, check_range, quantise, row_slices
from powerinfer_tools.checkpoint.gguf_file import PWRI
from powerinfer_tools.checkpoint.pwri_checkpoint import KEY_THRESHOLD
from powerinfer_tools.checkpoint.rope import plain_theta
from powerinfer_tools.checkpoint.source import Checkpoint
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.files import atomic_write, check_writable
from powerinfer_tools.predictors.file import Predictors
from powerinfer_tools.progress import Progress, default_progress

QUANTS = ("f16", "q4_0")
ACTIVATION = {"llama": "relu", "bamboo": "drelu"}
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
    check_writable(output, force)
    folder = output.parent / COUNTS
    if folder.exists() and not force:
        raise PowerinferError(f"{folder} exists: use --force to replace it", "exists")
    threshold = _threshold(predictors, checkpoint.config.n_layer)
    metadata = _metadata(checkpoint, quant) | {KEY_THRESHOLD: threshold}
    blocks = _Blocks(checkpoint, predictors)
    table = _table(checkpoint, predictors, quant)
    with default_progress(progress) as show, atomic_write(output, force) as file:
        write_gguf(file, metadata, table, _reported(blocks, table, show), PWRI)
    _write_counts(activations, folder)


def _reported(blocks: "_Blocks", table: list[TensorPlan], show: Progress) -> Iterator[Iterator[Array]]:
    for done, plan in enumerate(table):
        yield blocks.of(plan)
        show("split, tensors", done + 1, len(table))


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


def _metadata(checkpoint: Checkpoint, quant: str) -> dict[str, Value]:
    config, path = checkpoint.config, checkpoint.path
    if quant not in QUANTS:
        raise _refuse(path, "F16 and Q4_0", f"--quant {quant}")
    if ACTIVATION.get(config.arch) != config.activation or any(config.thresholds):
        expected = ", ".join(f"{arch} with {activation}" for arch, activation in ACTIVATION.items())
        raise _refuse(path, expected, f"{config.arch} with {config.activation}")
    if checkpoint.biases or config.tied or config.n_head * config.head_dim != config.n_embd:
        raise _refuse(path, "no biases, an output matrix, and heads that make up n_embd", "another model")
    theta = plain_theta(config.rope, config.head_dim) if config.rope is not None else None
    if theta is None:
        raise _refuse(path, "plain rotary positions", "others")
    sizes: dict[str, Value] = {
        "context_length": config.n_ctx,
        "embedding_length": config.n_embd,
        "block_count": config.n_layer,
        "feed_forward_length": config.n_ff,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": theta,
        "attention.head_count": config.n_head,
        "attention.head_count_kv": config.n_head_kv,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
    }
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


def _table(checkpoint: Checkpoint, predictors: Predictors, quant: str) -> list[TensorPlan]:
    config = checkpoint.config
    d, kv, n_ff = config.n_embd, config.n_head_kv * config.head_dim, config.n_ff
    matrices = {"token_embd": (d, config.n_vocab), "output": (d, config.n_vocab)}
    norms = ["output_norm"]
    for i, plan in enumerate(predictors.plans):
        b = f"blk.{i}"
        norms += [f"{b}.attn_norm", f"{b}.ffn_norm"]
        matrices |= {f"{b}.attn_{part}": (d, n) for part, n in (("q", d), ("k", kv), ("v", kv), ("output", d))}
        matrices |= {f"{b}.ffn_{part}": (d, n_ff) for part in ("gate", "up", "down_t")}
        matrices |= {f"{b}.fc1": (d, plan.rank), f"{b}.fc2": (plan.rank, n_ff)}
    for name, (row, _) in matrices.items():
        if quant == "q4_0" and row % 32:
            raise _refuse(checkpoint.path, "rows of whole blocks of 32 in Q4_0", f"{name} with rows of {row}")
    table = [TensorPlan(f"{name}.weight", "f32", (d,)) for name in norms]
    return table + [TensorPlan(f"{name}.weight", quant, shape) for name, shape in matrices.items()]


class _Blocks:
    """What the tensors hold, in the checkpoint's order of neurons."""

    def __init__(self, checkpoint: Checkpoint, predictors: Predictors) -> None:
        self.checkpoint, self.predictors = checkpoint, predictors

    def of(self, plan: TensorPlan) -> Iterator[Array]:
        """The tensor's bytes, in parts."""
        part = plan.name.split(".")[-2]
        if len(plan.shape) == 1:
            yield quantise(plan, self.checkpoint.read(plan.name))
        elif part in ("fc1", "fc2", "ffn_down_t", "attn_q", "attn_k"):
            numbers = self._whole(plan.name, part)
            check_range(plan, plan.name, numbers)
            yield quantise(plan, numbers)
        else:
            for rows in row_slices(plan.shape[1], plan.shape[0]):
                numbers = self.checkpoint.read(plan.name, rows)
                check_range(plan, plan.name, numbers, rows.start)
                yield quantise(plan, numbers)

    def _whole(self, name: str, part: str) -> FloatArray:
        if part in ("fc1", "fc2"):
            return self.predictors.weights(int(name.split(".")[1]))[("fc1", "fc2").index(part)]
        if part == "ffn_down_t":
            return np.ascontiguousarray(self.checkpoint.read(name.replace("_t.", ".")).T)
        rows = self.checkpoint.read(name)  # of a head's halves: theirs alternate
        halves = rows.reshape(-1, 2, self.checkpoint.config.head_dim // 2, rows.shape[1])
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def _write_counts(activations: Activations, folder: Path) -> None:
    import torch

    folder.mkdir(exist_ok=True)
    for i in range(activations.n_layer):
        with atomic_write(folder / f"activation_{i}.pt", force=True) as file:
            torch.save(torch.from_numpy(activations.counts(i)).float(), file)
