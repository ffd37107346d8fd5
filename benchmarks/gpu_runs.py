"""Whole runs of small random models: processor and card together against the processor alone.

    python benchmarks/gpu_runs.py                      # all models, types of weights, placements and modes
    python benchmarks/gpu_runs.py --small              # a few of them, short: under compute-sanitizer
    python benchmarks/gpu_runs.py --device host        # without a card: every bit must be the same

The models have the structures of the families that run with a card (norms, biases, parallel blocks, positions, gated
or plain, activations, experts), and predictors that let through what might fire. A run is a prompt, decoding, going
back and decoding on, and a scored text. On a card logits may differ by NMSE, and in F32 and F16 the likeliest tokens
must be the same but where two are closer than TIE: the processor rounds activations to 8 bits for Q8_0 and Q4_0, the
card does not. Of experts all are used, since a choice among them may hang on a rounding.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.gpu_row import Logits, agreement_of
from powerinfer_tools.artifact import Artifact
from powerinfer_tools.checkpoint import Experts
from powerinfer_tools.engine import CardLimits, Engine, Model
from powerinfer_tools.engine.native import chunk_bounds
from tests.artifacts import write_artifact
from tests.drawn import DrawnCheckpoint, drawn_config, rope_of

NMSE = {"f32": 1e-5, "f16": 1e-5, "q8_0": 2e-3, "q4_0": 2e-3}
BIASES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
WIDE: dict[str, Any] = {"n_embd": 96, "n_ff": 352, "n_head": 6, "n_ctx": 512}
PLAIN: dict[str, Any] = {"gated": False, "norm": "layer"}


@dataclass(frozen=True)
class Small:
    """A model: fields of a Config beside WIDE's, the parts with a bias, what predictors read."""

    fields: dict[str, Any]
    biases: tuple[str, ...] = ()
    input: str = "ffn_input"


MODELS = {
    "llama": Small({}),
    "qwen2": Small({"tied": True}, BIASES[:3]),
    "silu": Small({"activation": "silu", "thresholds": (1e-3,) * 2}),
    "opt": Small(PLAIN | {"learned_positions": True, "rope": None, "tied": True}, (*BIASES[:4], *BIASES[5:])),
    "falcon": Small(PLAIN | {"parallel": True, "n_head_kv": 1}),
    "nemotron": Small(PLAIN | {"activation": "relu2", "rope": rope_of(8)}),
    "arcee": Small({"activation": "relu2", "gated": False}),
    "bamboo": Small({"activation": "drelu", "n_head_kv": 6}, input="stream"),
    "minicpm": Small({"activation": "fatrelu", "thresholds": (0.01,) * 2}),
    "mixtral": Small({"experts": Experts(4, 4, "softmax", "ffn_input")}),
    "smallthinker": Small({"experts": Experts(8, 8, "sigmoid", "layer_input")}),
    "nanochat": Small({"activation": "relu2", "gated": False, "qk_norm": True, "softcap": 15.0}),
    "all biases": Small({"rope": rope_of(16, backwards=True, scale=0.8)}, BIASES),
    "odd": Small({"n_layer": 3, "n_embd": 72, "n_ff": 3 * 277, "head_dim": 20, "rotary": (True, False, True)}),
}
SMALL = ("falcon", "odd"), ("q4_0",), 24  # models, types of weights, tokens of a prompt
MODES = {"gate": ("dense", "gate"), "predictor": ("dense", "gate", "predictor")}  # of each kind of artifact
SLACK = 0.5  # of predictors: what they hold back is far from firing, so that no rounding lets it through
CTX, PROMPT, DECODED, SCORED, BACK, LENT = 512, 300, 12, 40, 9, 16  # tokens; a prompt is more than one batch


def compare(device: str, names: Iterable[str], quants: Iterable[str], prompt: int) -> Iterator[dict[str, Any]]:
    """One comparison after the other: what it is of, and how far the two are apart."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        for name, quant, kind in product(names, quants, MODES):
            artifact = write(MODELS[name], quant, kind, path)
            alone = {mode: outputs(Model(path), mode, prompt) for mode in MODES[kind]}
            for placement, limits in placements(artifact, device).items():
                model = Model(path, None, limits)
                for mode in MODES[kind]:
                    case = {"model": name, "quant": quant, "artifact": kind, "placement": placement, "mode": mode}
                    yield case | judge(outputs(model, mode, prompt), alone[mode], quant, device)


def write(small: Small, quant: str, kind: str, path: Path) -> Artifact:
    fields = WIDE | small.fields
    fields.setdefault("thresholds", (0.0,) * fields.get("n_layer", 2))
    checkpoint = DrawnCheckpoint(drawn_config(**fields), small.biases)
    how: dict[str, Any] = {"predictor": kind == "predictor", "input": small.input}
    return write_artifact(checkpoint, path, quant=quant, always=40, slack=SLACK, **how)


def placements(artifact: Artifact, device: str) -> dict[str, CardLimits]:
    """All but experts on the card, each kind of part alone, and mixtures; some lend it the other neurons."""
    config = artifact.config
    n_ff = config.n_ff if config.experts is None else 0
    bounds = [chunk_bounds(artifact.frequency(i)) if n_ff else [0] for i in range(config.n_layer)]
    rng = np.random.default_rng(0)

    def limits(dense: Any, neurons: list[int], head: bool, lend_from: int = 0) -> CardLimits:
        return CardLimits(tuple(bool(x) for x in dense), tuple(neurons), head, lend_from=lend_from, device=device)

    n = config.n_layer
    all_of, none, half = [n_ff] * n, [0] * n, [row[len(row) // 2] for row in bounds]
    found = {
        "all": limits([True] * n, all_of, True),
        "head": limits(none, none, True),
        "dense blocks": limits([True] * n, none, False),
        "neurons": limits(none, all_of, False),
        "half of the neurons": limits(none, half, False),
        "dense blocks and half of the neurons, lent the others": limits([True] * n, half, True, LENT),
        "last layer": limits([*none[1:], 1], [*none[1:], n_ff], True),
    }
    for i in range(3):
        drawn = [int(rng.choice(row)) for row in bounds]
        found[f"drawn {i}"] = limits(rng.integers(0, 2, n), drawn, bool(i % 2), LENT * (i % 2))
    return found


def outputs(model: Model, mode: str, n_prompt: int = PROMPT) -> dict[str, Logits]:
    """Logits of a prompt, of decoding after it and, from an earlier place, again, and of a scored text."""
    ids = np.random.default_rng(1).integers(0, model.info.n_vocab, n_prompt + DECODED + SCORED).tolist()
    prompt, tokens, text = ids[:n_prompt], ids[n_prompt : n_prompt + DECODED], ids[n_prompt + DECODED :]
    with Engine(model, ctx_size=CTX, threads=2, mode=mode) as engine:
        of_prompt = engine.prefill(prompt, logits=True)
        assert of_prompt is not None
        decoded = [engine.decode(token, logits=True) for token in tokens]
        engine.truncate(n_prompt - BACK)
        again = [engine.decode(token, logits=True) for token in tokens]
        scored = engine.score(text)[0]
    return {"prompt": of_prompt[None], "decoded": np.array(decoded), "again": np.array(again), "scored": scored}


def judge(found: dict[str, Logits], expected: dict[str, Logits], quant: str, device: str) -> dict[str, Any]:
    """The worst of a run's parts, and whether it is good enough."""
    parts = {name: agreement_of(found[name], expected[name]) for name in expected}
    worst = max(part["nmse"] for part in parts.values())
    far = sum(part["far_tokens"] for part in parts.values())
    equal = all(part["equal"] for part in parts.values())
    near = worst <= NMSE[quant] and (far == 0 or quant not in ("f32", "f16"))
    return {"nmse": worst, "far_tokens": far, "equal": equal, "good": equal if device == "host" else near}


def summary(found: list[dict[str, Any]]) -> str:
    """A line a type of weights, and one for each comparison that is not good enough."""
    lines = []
    for quant in dict.fromkeys(one["quant"] for one in found):
        of_quant = [one for one in found if one["quant"] == quant]
        worst, equal = max(one["nmse"] for one in of_quant), sum(one["equal"] for one in of_quant)
        lines.append(f"{quant}: {len(of_quant)} runs, {equal} equal bit for bit, worst NMSE {worst:.1e}")
    lines += [f"NOT GOOD: {json.dumps(one)}" for one in found if not one["good"]]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "host"), default="cuda")
    parser.add_argument("--small", action="store_true", help="few models, short prompts")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--quants", nargs="+", default=list(NMSE), choices=NMSE)
    parser.add_argument("--prompt", type=int, default=PROMPT, help="tokens")
    given = parser.parse_args()
    which = SMALL if given.small else (given.models, given.quants, given.prompt)
    found = list(compare(given.device, *which))
    print(summary(found))
    return int(not all(one["good"] for one in found))


if __name__ == "__main__":
    sys.exit(main())
