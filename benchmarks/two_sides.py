"""Two processors, foretold and measured, without a card: a thread of its own has the part that else a card has.

    python benchmarks/two_sides.py                          # 10 minutes with two idle cores
    python benchmarks/two_sides.py --layers 4 --rounds 2 -o two_sides.json

The scheduler, the search and the time model are those of a run with a card; the two sides are one thread each, measured
each alone, so that neither is faster: what a division gains is what they do at the same time. Run in turn, round by
round, of LLaMA-2-7B's shape with fewer layers: one thread alone, the plan that is found within a budget, hottest first
and random (gpu_plans.py); once with few neurons active, once with all, dense. All logits equal those of one thread
alone bit for bit. Needs two idle cores whose memory is about twice as fast as one's. Progress and the table (Markdown)
go to stderr, the document to stdout or the file of -o. Exit status: 1 where logits differ.
"""

import argparse
import os
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import gpu_plans as plans
from benchmarks.gpu_row import OURS, PROCESSOR, Case, Contender, Models, all_contenders, compare, in_turn, run
from benchmarks.report import write_document
from benchmarks.shapes import SHAPES, write_shape
from powerinfer_tools.placement import Machine, measure_machine
from powerinfer_tools.placement.measure import with_card

SHARES = (0.25, 0.5)  # of the model, what the stand-in may hold
PROMPT, DECODE = 16, 64  # tokens


def contenders_of(case: Case, model: Path, machine: Machine) -> list[Contender]:
    """Those of gpu.py's rows but whole layers, whose sides never work at the same time; where all neurons are active
    the processor alone and ours, dense."""
    if case.active < 1:
        return [c for c in all_contenders(case, model, machine) if c.mode != "dense"]
    problem = plans.dense_problem(case.shape, case.quant, machine, case.ctx_size)
    ours = plans.found(problem, plans.budget(problem, case.share))
    return [
        Contender(OURS, "dense", ours, problem),
        Contender(PROCESSOR, "dense", plans.nothing(problem), problem),
    ]


def row(case: Case, model: Path, machine: Machine, rounds: int) -> dict[str, Any]:
    """Each contender's times, foretold time, and whether its logits are those of the processor alone."""
    contenders = contenders_of(case, model, machine)
    models = Models(contenders, model, case.device)
    agreements = compare(case, contenders, models)
    runs = in_turn(contenders, rounds, lambda c: run(models.of(c), c.mode, case))
    found: dict[str, Any] = {}
    for c in contenders:
        agreement = agreements[c.name]
        found[c.name] = {
            "ms": [each.ms for each in runs[c.name]],
            "predicted_ms": float(c.problem.seconds(c.plan)) * 1e3,
            "predicted_gain": float(c.problem.seconds(plans.nothing(c.problem)) / c.problem.seconds(c.plan)),
            "gain": [a.ms / b.ms for a, b in zip(runs[PROCESSOR], runs[c.name], strict=True)],
            "neurons": int(c.plan.vram.sum()),
            "blocks": int(c.plan.dense.sum()),
            "equal": agreement is None or agreement["equal"],
        }
    return found


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| there; plan | measured ms | foretold / measured | gain over one thread (min to max) | foretold gain | "
        "blocks, neurons there |",
        "|---|---|---|---|---|---|",
    ]
    for share, contenders in rows.items():
        for name, c in contenders.items():
            ms, gain = statistics.median(c["ms"]), statistics.median(c["gain"])
            lines.append(
                f"| {share}: {name} | {ms:.1f} | {c['predicted_ms'] / ms:.2f} | {gain:.2f} "
                f"({min(c['gain']):.2f} to {max(c['gain']):.2f}) | {c['predicted_gain']:.2f} "
                f"| {c['blocks']}, {c['neurons']} |"
            )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quant", default="q4_0", choices=("q4_0", "q8_0", "f16"))
    parser.add_argument("--active", type=float, default=0.1)
    parser.add_argument("-o", "--output", type=Path)
    return parser.parse_args()


def main() -> int:
    given = parse()
    os.environ["POWERINFER_DEVICE"] = "host"
    shape = replace(SHAPES["llama-2-7b"], n_layer=given.layers)
    machine = with_card(measure_machine(1, card=False), lambda text: print(text, file=sys.stderr))
    rows: dict[str, dict[str, Any]] = {}
    for active in (given.active, 1.0):
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "model.gguf"
            write_shape(shape, given.quant, active, model)
            for share in SHARES:
                case = Case(shape, given.quant, active, share, 1, "host", PROMPT, DECODE)
                rows[f"{active:.0%} active, {share:.0%}"] = row(case, model, machine, given.rounds)
    print(markdown(rows), file=sys.stderr)
    write_document({"machine": machine.to_json(), "rows": rows}, given.output)
    return 0 if all(c["equal"] for contenders in rows.values() for c in contenders.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
