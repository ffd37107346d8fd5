"""What the runs found: the table in Markdown, and everything as one JSON document."""

import json
import os
import platform
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Target = tuple[float, float] | None
"""What is asked: at least, aim."""

IDLE_SHARE = 0.05  # of the processors' time: what other programs may take of a run that counts


@dataclass(frozen=True)
class Line:
    """One measure: a value a round, of ours and of theirs. Its result is their ratio, or ours where theirs is None."""

    measure: str
    unit: str
    ours: list[float]
    theirs: list[float] | None = None
    target: Target = None

    @property
    def results(self) -> list[float]:
        return self.ours if self.theirs is None else [a / b for a, b in zip(self.ours, self.theirs, strict=True)]

    @property
    def reached(self) -> str:
        """aim, at least or neither; nothing where nothing is asked."""
        if self.target is None:
            return ""
        found = statistics.median(self.results)
        at_least, aim = self.target
        return "aim" if found >= aim else "at least" if found >= at_least else "neither"


@dataclass
class Findings:
    """All lines in order, and what they depend on.

    models: what was planted and measured of each; ceilings: reads that our runs measured, GB/s by threads; others: the
    share of processor time that other programs took, run by run.
    """

    lines: list[Line] = field(default_factory=list)
    models: list[dict[str, Any]] = field(default_factory=list)
    ceilings: dict[int, list[float]] = field(default_factory=dict)
    others: list[float] = field(default_factory=list)
    repeated: int = 0  # runs that others disturbed, and that do not count

    @property
    def idle(self) -> bool:
        """Whether our and their runs had the machine to themselves."""
        return max(self.others) <= IDLE_SHARE


def spread(values: list[float], decimals: int) -> str:
    """median (min to max)"""
    median, low, high = (f"{value:.{decimals}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{median} ({low} to {high})"


def table(rows: list[list[str]]) -> str:
    """In Markdown; the first row is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in lines
    )


def markdown(findings: Findings) -> str:
    """The table, and under it what the models were."""
    rows = [["measure", "ours", "llama.cpp", "result (min to max)", "at least", "aim", "reached"]]
    for line in findings.lines:
        unit = "×" if line.theirs else line.unit
        at_least, aim = (f"{value:g} {unit}" for value in line.target) if line.target else ("", "")
        sides = [spread(side, 2) if side else "" for side in (line.ours if line.theirs else None, line.theirs)]
        result = f"{spread(line.results, 0 if unit == '%' else 2)} {unit}"
        rows.append([line.measure, *sides, result, at_least, aim, line.reached])
    text = [table(rows)]
    text.append("\nTokens/s; medians of the rounds. Models are of random weights, but for the default one.")
    for model in findings.models:
        n_bytes, dense = model["bytes_per_token"] / 1e9, model["dense_bytes_per_token"] / 1e9
        text.append(
            f"{model['model']}: {model['active']:.1%} of the neurons fired; a token read {n_bytes:.2f} GB, "
            f"llama.cpp's {dense:.2f} ({dense / n_bytes:.2f} × as much)."
        )
    for threads, found in sorted(findings.ceilings.items()):
        text.append(f"Read ceiling, threads {threads}: {spread(found, 1)} GB/s.")
    text.append(f"Processor time that other programs took: {spread([100 * share for share in findings.others], 1)} %.")
    if findings.repeated:
        text.append(f"Run again, since others took more than {IDLE_SHARE:.0%} of it: {findings.repeated} runs.")
    if not findings.idle:
        text.append("THE MACHINE WAS NOT IDLE: these figures do not count.")
    return "\n".join(text)


def document(findings: Findings) -> dict[str, Any]:
    """The machine, the models, and every line with its value of each round."""
    lines = []
    for line in findings.lines:
        at_least, aim = line.target or (None, None)
        results = {"result": statistics.median(line.results), "min": min(line.results), "max": max(line.results)}
        sides = {"measure": line.measure, "unit": line.unit, "ours": line.ours, "llama.cpp": line.theirs}
        lines.append(sides | results | {"at_least": at_least, "aim": aim, "reached": line.reached})
    others = {"median": statistics.median(findings.others), "max": max(findings.others), "idle": findings.idle}
    others["repeated"] = findings.repeated
    about = {"machine": machine(findings.ceilings), "others_share": others, "models": findings.models}
    return about | {"lines": lines}


def machine(ceilings: dict[int, list[float]]) -> dict[str, Any]:
    return {
        "processor": processor(),
        "processors": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": platform.platform(),
        "read_ceiling_gb_s": {str(threads): statistics.median(found) for threads, found in sorted(ceilings.items())},
    }


def processor() -> str:
    """The processor's name, as Linux knows it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def write_document(document: dict[str, Any], output: Path | None) -> None:
    """As JSON to the file, or to stdout where there is none."""
    text = json.dumps(document, indent=1)
    if output:
        output.write_text(text + "\n")
    else:
        print(text)
