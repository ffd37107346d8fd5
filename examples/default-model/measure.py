"""What the sparse default model costs and buys against the original, in each type of weights: a table, and as JSON.

python examples/default-model/measure.py            prints the table; the JSON goes to .demo/measure/measured.json

Perplexity is of the artifact as it runs (patched, quantised, sparse) over that of the original model in f32. Decoding
is timed in turn, sparse and dense of the same artifact, so that what else the machine does falls on both.
"""

import argparse
import json
import os
import shutil
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from powerinfer_tools.artifact import open_artifact
from powerinfer_tools.artifact.layout import MODE_NAMES
from powerinfer_tools.bench import bench
from powerinfer_tools.build import build
from powerinfer_tools.checkpoint import open_checkpoint
from powerinfer_tools.default_model import PATCH, default_base
from powerinfer_tools.evaluate import Evaluation, evaluate, evaluate_windows
from powerinfer_tools.sparsify.documents import cut_windows, encode, read_documents
from powerinfer_tools.tokens import Tokenizer

HERE = Path(__file__).parent
CORPUS = HERE.parent / "corpus"
CALIBRATION = [CORPUS / f"{name}.txt" for name in ("sotu", "factbook", "jargon")]
QUANTS = ("q8_0", "q4_0", "f16")
ORDERED_BY = 1024  # tokens that order the original's neurons: all of them are computed anyway
SCORED = 16384  # tokens of each held-out set at most
MODES = {"sparse": "auto", "dense": "dense"}


@dataclass(frozen=True)
class Measured:
    """One artifact. perplexity, ratio (over the original's): by set, text and chats; top1: sparse against dense.

    modes: layers by how they choose neurons; decode: tokens/s of each round, sparse and dense; empty for the original.
    """

    name: str
    n_bytes: int
    perplexity: dict[str, float]
    ratio: dict[str, float]
    active: float
    top1: float
    modes: dict[str, int]
    decode: dict[str, list[float]]

    @property
    def gain(self) -> float:
        """Sparse over dense, the median of the rounds."""
        return statistics.median(a / b for a, b in zip(self.decode["sparse"], self.decode["dense"], strict=True))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--base", type=Path, help="the original; without it, the default model's")
    arguments.add_argument("--patch", type=Path, default=PATCH, help="what makes it sparse")
    arguments.add_argument("--chats", type=Path, default=HERE / "heldout-chats.jsonl", help="held-out chats")
    arguments.add_argument("--quants", nargs="+", default=QUANTS, choices=("f32", *QUANTS))
    arguments.add_argument("--rounds", type=int, default=3, help="of decoding, each sparse and dense")
    arguments.add_argument("--work", type=Path, default=Path(".demo/measure"), help="folder for artifacts and results")
    args = arguments.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    base = args.base or default_base()
    original = build_original(base, args.work / "original.gguf")
    sparse = [build_sparse(base, args.patch, quant, args.work) for quant in args.quants]
    windows = chat_windows(base, args.chats)
    dense = score(original, windows)
    found = [measured("original, f32", original, dense, dense, {"sparse": [], "dense": []})]
    speeds = decode_in_turn(sparse, args.rounds)
    for path, quant in zip(sparse, args.quants, strict=True):
        found.append(measured(f"sparse, {quant}", path, score(path, windows), dense, speeds[path]))
    print(markdown(found))
    document = {"threads": len(os.sched_getaffinity(0)), "artifacts": [asdict(m) for m in found]}
    (args.work / "measured.json").write_text(json.dumps(document, indent=1) + "\n")


def build_original(base: Path, output: Path) -> Path:
    return build(base, CALIBRATION, output, quant="f32", n_tokens=ORDERED_BY).path


def build_sparse(base: Path, patch: Path, quant: str, work: Path) -> Path:
    """The artifact in that type; all types share one profile."""
    profile, mine = work / "sparse.activations", work / f"sparse-{quant}.activations"
    if profile.exists():
        shutil.copyfile(profile, mine)
    artifact = build(base, CALIBRATION, work / f"sparse-{quant}.gguf", patch=patch, quant=quant, keep=True)
    shutil.copyfile(mine, profile)
    return artifact.path


def chat_windows(base: Path, chats: Path) -> list[list[int]]:
    checkpoint = open_checkpoint(base)
    tokenizer = Tokenizer(checkpoint.tokenizer_json, checkpoint.special)
    encoded = [encode(chat, tokenizer, checkpoint.chat_template) for chat in read_documents(chats)]
    return cut_windows(encoded, 512)[: SCORED // 512].tolist()


def score(path: Path, chats: list[list[int]]) -> dict[str, Evaluation]:
    """By held-out set."""
    text = evaluate(path, [CORPUS / "heldout.txt"], n_tokens=SCORED)
    return {"text": text, "chats": evaluate_windows(path, chats)}


def decode_in_turn(paths: Iterable[Path], rounds: int) -> dict[Path, dict[str, list[float]]]:
    """Tokens/s of each round, by artifact and mode."""
    speeds: dict[Path, dict[str, list[float]]] = {path: {mode: [] for mode in MODES} for path in paths}
    for _ in range(rounds):
        for path, found in speeds.items():
            for name, mode in MODES.items():
                run = bench(path, mode=mode, n_tokens=128, repeats=1)
                found[name].append(run["decode"]["tokens_per_s"])
    return speeds


def measured(
    name: str,
    path: Path,
    mine: dict[str, Evaluation],
    original: dict[str, Evaluation],
    decode: dict[str, list[float]],
) -> Measured:
    artifact, text = open_artifact(path), mine["text"]
    modes = [MODE_NAMES[mode] for mode in artifact.modes]
    return Measured(
        name,
        artifact.n_bytes,
        {key: found.perplexity["sparse"] for key, found in mine.items()},
        {key: found.perplexity["sparse"] / original[key].perplexity["dense"] for key, found in mine.items()},
        statistics.mean(layer["active_ratio"] for layer in text.layers),
        text.top1_agreement,
        {mode: modes.count(mode) for mode in sorted(set(modes))},
        decode,
    )


def markdown(found: list[Measured]) -> str:
    """A row an artifact."""
    header = ["model", "MB", "perplexity, texts", "chats", "active", "top-1 as dense", "layers"]
    rows = [[*header, "decode, tokens/s", "dense", "gain"], ["---"] * 10]
    for m in found:
        scores = [f"{m.perplexity[key]:.2f} ({m.ratio[key]:.3f} ×)" for key in ("text", "chats")]
        layers = ", ".join(f"{n} {mode}" for mode, n in m.modes.items())
        speeds = [f"{statistics.median(m.decode[mode]):.0f}" for mode in MODES] if m.decode["sparse"] else ["", ""]
        gain = f"{m.gain:.2f} ×" if m.decode["sparse"] else ""
        rows.append(
            [m.name, f"{m.n_bytes / 1e6:.0f}", *scores, f"{m.active:.1%}", f"{m.top1:.1%}", layers, *speeds, gain]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    main()
