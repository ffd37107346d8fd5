"""What sparsity costs: perplexity and agreement, sparse against dense, and each layer's recall."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from powerinfer_tools.artifact import open_artifact
from powerinfer_tools.engine import Engine, LayerScore
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.placement.limits import open_within
from powerinfer_tools.progress import Progress, default_progress
from powerinfer_tools.tokens import Tokenizer

FloatArray = npt.NDArray[np.float32]
DECODED = 128  # tokens that are also run one by one


@dataclass
class Evaluation:
    """Over `tokens` predicted tokens: perplexities by mode, and the sparse run against the dense one.

    perplexity: sparse (as the artifact runs), dense (all neurons) and, where thresholds cut the activation, uncut (the
    model before the cut). top1_agreement and kl_mean (nats, KL(dense || sparse)) are over positions. These score whole
    windows at once with each layer's selection applied; `decoding` has the same two for the first tokens run one by
    one through the kernels that generation uses, sparse against dense.
    """

    tokens: int = 0
    perplexity: dict[str, float] = field(default_factory=dict)
    top1_agreement: float = 0.0
    kl_mean: float = 0.0
    layers: list[dict[str, float | int]] = field(default_factory=list)
    decoding: dict[str, float | int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The document of `eval --json`."""
        return dict(self.__dict__)


def evaluate(
    path: Path,
    corpus: list[Path],
    *,
    n_tokens: int = 8192,
    window: int = 512,
    threads: int | None = None,
    ram: int | None = None,
    vram: int = 0,
    say: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Scores windows of the corpus by teacher forcing, each from an empty context; ram, vram: bytes to stay within.

    Errors: a corpus too short for one window; whatever the artifact's reader finds.
    """
    artifact = open_artifact(path)
    window = min(window, artifact.config.n_ctx)
    windows = _windows(Tokenizer(artifact.tokenizer_json, artifact.special), corpus, n_tokens, window)
    return evaluate_windows(path, windows, threads=threads, ram=ram, vram=vram, say=say, progress=progress)


def evaluate_windows(
    path: Path,
    windows: list[list[int]],
    *,
    threads: int | None = None,
    ram: int | None = None,
    vram: int = 0,
    say: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """As evaluate, on windows of token ids, at least one and all of one length."""
    artifact, window = open_artifact(path), len(windows[0])
    runs = {"sparse": "auto", "dense": "dense"}
    uncut = artifact.config.activation == "silu" and any(artifact.config.thresholds)
    contexts = len(runs) + uncut
    model = open_within(artifact, ram, vram, ctx_size=window, threads=threads, contexts=contexts, say=say).model
    engines = {name: Engine(model, ctx_size=window, threads=threads, mode=mode) for name, mode in runs.items()}
    if uncut:
        engines["uncut"] = Engine(model, ctx_size=window, threads=threads, mode="dense", uncut=True)
    totals = _Totals(artifact.config.n_layer, artifact.config.n_ff)
    with default_progress(progress) as report:
        for i, ids in enumerate(windows):
            logits: dict[str, FloatArray] = {}
            for name, engine in engines.items():
                engine.truncate(0)
                logits[name], scores = engine.score(ids)
                if name == "sparse":
                    totals.add_layers(scores)
            totals.add_logits(logits, ids)
            report("eval, windows", i + 1, len(windows))
    result = totals.result()
    result.decoding = _compare_decoding(engines["sparse"], engines["dense"], windows[0][:DECODED])
    return result


def _compare_decoding(sparse: Engine, dense: Engine, ids: list[int]) -> dict[str, float | int]:
    """Agreement and divergence of the two engines, token by token from an empty context."""
    agree, kl = 0, 0.0
    for engine in (sparse, dense):
        engine.truncate(0)
    for token in ids:
        log_p, log_q = (_log_softmax(_decode(engine, token)) for engine in (dense, sparse))
        agree += int(log_p.argmax() == log_q.argmax())
        kl += _divergence(log_p, log_q)
    return {"tokens": len(ids), "top1_agreement": agree / len(ids), "kl_mean": kl / len(ids)}


def _decode(engine: Engine, token: int) -> FloatArray:
    logits = engine.decode(token, logits=True)
    assert logits is not None
    return logits


def _windows(tokenizer: Tokenizer, corpus: list[Path], n_tokens: int, window: int) -> list[list[int]]:
    """Windows of equal length, spread evenly over the corpus."""
    if not corpus:
        raise PowerinferError("--corpus: expected at least one text file", "usage")
    windows: list[list[int]] = []
    for path in corpus:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PowerinferError(f"{path}: expected a UTF-8 text file: {error}", "usage") from error
        ids = tokenizer.encode(text, add_bos=False, parse_special=False)
        windows += [ids[at : at + window] for at in range(0, len(ids) - window + 1, window)]
    if not windows:
        raise PowerinferError(f"--corpus: expected at least {window} tokens, found fewer", "usage")
    n = min(max(1, n_tokens // window), len(windows))
    return [windows[i * len(windows) // n] for i in range(n)]


class _Totals:
    """Sums over windows."""

    def __init__(self, n_layer: int, n_ff: int) -> None:
        self.n_ff = n_ff
        self.layers = np.zeros((n_layer, 4), np.int64)  # tokens, true, predicted, hit
        self.loss: dict[str, float] = {}
        self.n = 0
        self.agree = 0
        self.kl = 0.0

    def add_layers(self, scores: list[LayerScore]) -> None:
        self.layers += np.array([(s.n_tokens, s.n_true, s.n_predicted, s.n_hit) for s in scores], np.int64)

    def add_logits(self, logits: dict[str, FloatArray], ids: list[int]) -> None:
        targets = np.asarray(ids[1:])
        log_p = {name: _log_softmax(array[:-1]) for name, array in logits.items()}
        for name, array in log_p.items():
            loss = -float(array[np.arange(len(targets)), targets].sum(dtype=np.float64))
            self.loss[name] = self.loss.get(name, 0.0) + loss
        self.n += len(targets)
        sparse, dense = log_p["sparse"], log_p["dense"]
        self.agree += int((sparse.argmax(-1) == dense.argmax(-1)).sum())
        self.kl += _divergence(dense, sparse)

    def result(self) -> Evaluation:
        return Evaluation(
            tokens=self.n,
            perplexity={name: math.exp(loss / self.n) for name, loss in self.loss.items()},
            top1_agreement=self.agree / self.n,
            kl_mean=self.kl / self.n,
            layers=[self._layer(i) for i in range(len(self.layers))],
        )

    def _layer(self, i: int) -> dict[str, float | int]:
        tokens, true, predicted, hit = (int(n) for n in self.layers[i])
        return {
            "layer": i,
            "recall": hit / true if true else 1.0,
            "precision": hit / predicted if predicted else 1.0,
            "active_ratio": true / (tokens * self.n_ff),
            "predicted_ratio": predicted / (tokens * self.n_ff),
        }


def _divergence(log_p: FloatArray, log_q: FloatArray) -> float:
    """KL(p || q) in nats, summed over positions."""
    return float((np.exp(log_p) * (log_p - log_q)).sum(dtype=np.float64))


def _log_softmax(x: FloatArray) -> FloatArray:
    shifted: FloatArray = x - x.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted
