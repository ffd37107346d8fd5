"""What gpu.py found: the table of its rows, what is asked of them, and what the time model says of another machine."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu_row import HOTTEST, LAYERS, OURS, PROCESSOR, RANDOM
from benchmarks.report import spread, table

Row = dict[str, Any]
Document = dict[str, Any]
NMSE = {"f16": 1e-5, "q4_0": 5e-3}  # of logits run dense: for Q4_0 the processor rounds activations to 8 bits
ACTIVE_OFF = 0.02  # of the share that is active: such a rounding lets other neurons through a planted predictor
WITHIN = (OURS, HOTTEST, RANDOM)  # whose plans keep the budget


@dataclass(frozen=True)
class Measure:
    """Something asked for. Where aim is below at_least, less is better. rows: what says something about it."""

    name: str
    unit: str
    values: list[float]
    at_least: float
    aim: float
    rows: list[Row]

    @property
    def value(self) -> float:
        return statistics.median(self.values)

    @property
    def reached(self) -> str:
        """aim, at least or neither."""
        sign = 1 if self.aim > self.at_least else -1
        better = [name for name in ("aim", "at least") if sign * self.value >= sign * self._asked(name)]
        return better[0] if better else "neither"

    def _asked(self, name: str) -> float:
        return self.aim if name == "aim" else self.at_least


def ratios(row: Row, other: str) -> list[float]:
    """How many times faster than another contender ours is, round by round; 1 where that does the same as ours."""
    ours = row["contenders"][OURS]["ms"]
    theirs = row["contenders"].get(other, row["contenders"][OURS])["ms"]
    return [b / a for a, b in zip(ours, theirs, strict=True)]


def whole_ratios(row: Row) -> list[float]:
    """Of a row with room for all: everything there, sparse, against dense. Ours may leave the processor a share."""
    whole = row["contenders"].get(HOTTEST, row["contenders"][OURS])["ms"]
    return [dense / sparse for sparse, dense in zip(whole, row["contenders"][LAYERS]["ms"], strict=True)]


def error(figures: dict[str, Any]) -> float:
    """How far the foretold time is from the measured one, of that."""
    return float(abs(figures["predicted_ms"] / statistics.median(figures["ms"]) - 1))


def bandwidth_ratio(row: Row) -> float:
    """GPU : CPU, of reads in sequence."""
    return float(row["machine"]["vram"]["sequential"] / row["machine"]["ram"]["sequential"])


def ceiling_share(row: Row) -> list[float]:
    """Of the card's sequential reads, what dense decoding of the whole model there reaches."""
    figures = row["contenders"][LAYERS]
    card = row["machine"]["vram"]["sequential"]
    return [figures["read_bytes"]["card"] / (ms / 1e3) / card for ms in figures["ms"]]


def measures(rows: list[Row]) -> Iterator[Measure]:
    """What is asked, of the rows that say something about it."""
    for row in rows:
        case = row["case"]
        what = f"{case['shape']['name']}, {case['quant']}, {case['threads']} threads"
        if case["shape"]["name"] == "falcon-40b" and case["share"] == 0.25:
            yield Measure(f"{what}: against whole layers, dense, 25 %", "×", ratios(row, LAYERS), 5, 11.69, [row])
        if case["share"] == 1:
            yield Measure(f"{what}: all on the card, sparse against dense", "×", whole_ratios(row), 1.3, 2, [row])
            shares = [100 * share for share in ceiling_share(row)]
            yield Measure(f"{what}: share of the card's read ceiling, dense", "%", shares, 70, 85, [row])
    partial = [row for row in rows if row["case"]["share"] < 1]
    for other in (HOTTEST, RANDOM):
        found = [statistics.median(ratios(row, other)) for row in partial]
        if found:
            yield Measure(f"against {other}, slowest row", "×", [min(found)], 1.0, 1.2, partial)
            yield Measure(f"against {other}, median of the rows", "×", found, 1.0, 1.2, partial)
    errors = [100 * error(figures) for row in rows for figures in row["contenders"].values()]
    if errors:
        yield Measure("foretold against measured time, all contenders", "%", errors, 25, 10, rows)
        yield Measure("foretold against measured time, worst", "%", [max(errors)], 25, 10, rows)


def agreement(row: Row) -> str:
    """How far the contenders with a card are from the processor alone, and the verdict: ok or NO."""
    found = {name: one for name, one in row["contenders"].items() if one["agreement"] is not None}
    if row["case"]["device"] == "host":
        return "equal" if all(one["agreement"]["equal"] for one in found.values()) else "NO: not bit for bit"
    dense = [one["agreement"] for one in found.values() if one["mode"] == "dense"]
    sparse = [one["agreement"]["nmse"] for one in found.values() if one["mode"] != "dense"]
    alone = row["contenders"][PROCESSOR]["active"]
    active = max(abs(one["active"] / alone - 1) for one in found.values() if one["mode"] != "dense")
    worst, quant = max(one["nmse"] for one in dense), row["case"]["quant"]
    far = sum(one["far_tokens"] for one in dense) if quant == "f16" else 0
    good = worst <= NMSE[quant] and not far and active <= ACTIVE_OFF
    return f"{'ok' if good else 'NO'}: NMSE dense {worst:.0e}, sparse {max(sparse):.0e}, active {active:.1%} off"


def sound(row: Row) -> bool:
    """Processor and card agree, and the budget is kept."""
    if "error" in row:
        return False
    kept = all(row["contenders"][name]["card_bytes"] <= row["vram"] for name in WITHIN if name in row["contenders"])
    return kept and not agreement(row).startswith("NO")


def markdown(document: Document) -> str:
    """All of it."""
    rows = sorted((row for row in document["rows"].values() if "error" not in row), key=order)
    parts = [] if document["device"] != "host" else [HOST]
    parts += [rows_table(rows), counters_table(rows), measures_table(list(measures(rows)))]
    parts += [f"FAILED: {key}: {row['error']}" for key, row in document["rows"].items() if "error" in row]
    return "\n\n".join([*parts, foretold_table(document["foretold"], rows)])


def order(row: Row) -> tuple[str, int, float]:
    """By model, threads and budget, the largest first."""
    return model(row), -row["case"]["threads"], -row["case"]["share"]


HOST = "THE HOST DEVICE STANDS IN FOR A CARD: this tries the script out, and its times mean nothing."


def rows_table(rows: list[Row]) -> str:
    lines = [
        "model, threads, budget, GPU : CPU, ours (ms), foretold, times as fast as whole layers, "
        "as hottest first, as random, as the processor alone, prompt (tokens/s), logits".split(", ")
    ]
    for row in rows:
        ours = row["contenders"][OURS]
        versus = [spread(ratios(row, other), 2) for other in (LAYERS, HOTTEST, RANDOM, PROCESSOR)]
        lines.append(
            [
                model(row),
                str(row["case"]["threads"]),
                f"{row['case']['share']:.0%}",
                f"{bandwidth_ratio(row):.1f}",
                spread(ours["ms"], 2),
                f"{ours['predicted_ms']:.2f}",
                *versus,
                f"{statistics.median(ours['prompt_tokens_per_s']):.0f}",
                agreement(row),
            ]
        )
    return table(lines)


def counters_table(rows: list[Row]) -> str:
    """Of a token, for each contender."""
    lines = [
        "model, threads, budget, GPU : CPU, contender, ms, foretold, blocks and head there, neurons there, hits there, "
        "transfers, waits, KB crossed, waiting (ms), MB read there, in RAM, bytes there, of the budget".split(", ")
    ]
    for row in rows:
        for name, c in row["contenders"].items():
            plan, case = c["plan"], row["case"]
            there = sum(plan["neurons"]) / (case["shape"]["n_ff"] * case["shape"]["n_layer"])
            lines.append(
                [
                    model(row),
                    str(case["threads"]),
                    f"{case['share']:.0%}",
                    f"{bandwidth_ratio(row):.1f}",
                    name,
                    f"{statistics.median(c['ms']):.2f}",
                    f"{c['predicted_ms']:.2f}",
                    f"{sum(plan['dense'])} of {len(plan['dense'])}{', head' if plan['head'] else ''}",
                    f"{there:.0%}",
                    f"{c['hits_card']:.0%}",
                    f"{c['transfers']:.1f}",
                    f"{c['waits']:.1f}",
                    f"{c['crossed_bytes'] / 1e3:.0f}",
                    f"{c['wait_ms']:.2f}",
                    f"{c['read_bytes']['card'] / 1e6:.0f}",
                    f"{c['read_bytes']['ram'] / 1e6:.0f}",
                    f"{c['card_bytes'] / 1e6:.0f} MB",
                    f"{c['card_bytes'] / row['vram']:.0%}",
                ]
            )
    return table(lines)


def measures_table(found: list[Measure]) -> str:
    lines = [["measure", "GPU : CPU", "found (min to max)", "at least", "aim", "reached"]]
    for measure in found:
        asked = [f"{value:g} {measure.unit}" for value in (measure.at_least, measure.aim)]
        bandwidths = spread([bandwidth_ratio(row) for row in measure.rows], 1)
        lines.append([measure.name, bandwidths, f"{spread(measure.values, 2)} {measure.unit}", *asked, measure.reached])
    return table(lines)


def foretold_table(foretold: list[dict[str, Any]], rows: list[Row]) -> str:
    lines = [["model", "card", "of the model", "ours (ms)", "whole layers, dense (ms)", "ratio"]]
    for one in foretold:
        times = [one["ours_ms"], one["layers_ms"], one["layers_ms"] / one["ours_ms"]]
        card = [f"{one['vram'] / 2**30:.1f} GiB", f"{one['vram'] / one['whole']:.0%}"]
        lines.append([one["model"], *card, *(f"{value:.2f}" for value in times)])
    on = f"{foretold[0]['machine']} (GPU : CPU {foretold[0]['bandwidth_ratio']:.1f})"
    text = f"Not measured: what the placement's time model expects of {on}\n\n" + table(lines)
    errors = [100 * error(figures) for row in rows for figures in row["contenders"].values()]
    if errors:
        text += f"\n\nOf the times measured here this model was off by {spread(errors, 0)} %."
    return text


def model(row: Row) -> str:
    case = row["case"]
    return f"{case['shape']['name']}, {case['shape']['n_layer']} layers, {case['quant']}, {case['active']:.0%} active"
