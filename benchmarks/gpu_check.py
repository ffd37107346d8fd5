"""Everything that a machine with a card can say of this engine: `make gpu-check`, described in docs/gpu-check.md.

    make gpu-check                                              # all steps, then the benchmarks
    make gpu-check ARGS="--time-limit 540 -o FOLDER"            # what can be done in 9 minutes; again: goes on
    make gpu-check ARGS="--steps kernels runs"
    make gpu-check ARGS="--device host"                         # without a card: what can be checked anywhere

Writes FOLDER/gpu-check.json and FOLDER/gpu-check.txt after every step. Exit status: 0 all is well, 1 not, 3 not all is
done yet.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

try:
    from benchmarks import gpu
    from benchmarks.gpu_report import markdown, sound
    from benchmarks.report import table
    from powerinfer_tools.engine.native import describe_card
    from powerinfer_tools.errors import PowerinferError
    from powerinfer_tools.files import atomic_write
except ModuleNotFoundError as error:
    sys.exit(f"gpu-check: expected the Python package {error.name}, found none: docs/gpu-check.md lists what is needed")

BUILD = Path("build/gpu")
STEP_SECONDS = 1800  # the most that a step's program may take


class Failed(Exception):
    """A step did, with what it says of it."""


class Left(Exception):
    """There was no time for all of a step."""


@dataclass
class Check:
    """What was found so far, and where it is written. end: when everything must be done."""

    given: argparse.Namespace
    end: float
    document: dict[str, Any] = field(default_factory=dict)

    @property
    def host(self) -> bool:
        return bool(self.given.device == "host")

    def save(self) -> None:
        """Both files."""
        self.given.output.mkdir(parents=True, exist_ok=True)
        for name, text in (("json", json.dumps(self.document, indent=1)), ("txt", report(self.document))):
            with atomic_write(self.given.output / f"gpu-check.{name}", force=True) as file:
                file.write((text + "\n").encode())

    def call(self, *words: Any, **env: str) -> str:
        """What a program prints. Errors: an exit status other than 0, no time left."""
        left = max(1, min(STEP_SECONDS, self.end - time.monotonic()))
        env = {**os.environ, **env}
        how: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        try:
            process = subprocess.Popen([str(word) for word in words], cwd=ROOT, env=env, start_new_session=True, **how)
        except FileNotFoundError:
            raise Failed(f"{words[0]}: no such program") from None
        try:
            said, _ = process.communicate(timeout=left)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)  # what it started, too
            process.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                raise Left(f"{words[0]}: not done after {left:.0f} s") from None
            raise
        if process.returncode:
            raise Failed(f"{' '.join(map(str, words))}: exit status {process.returncode}\n{said[-4000:]}")
        return str(said).strip()


def build(check: Check) -> None:
    """The engine and its CUDA part, which this process and those that it starts then use."""
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    options = ["-DPI_CUDA=ON", "-DPI_TESTS=ON", "-DCMAKE_CUDA_ARCHITECTURES=native"]  # for the card that is here
    check.call("cmake", "-S", "native", "-B", BUILD, *generator, *options)
    check.call("cmake", "--build", BUILD, "--parallel", "--target", "powerinfer", "powerinfer_cuda", "test_cuda")
    os.environ["POWERINFER_LIB"] = str((ROOT / BUILD / "libpowerinfer.so").resolve())


def card(check: Check) -> str:
    """Which card and driver."""
    name, total, _, context = describe_card(check.given.device)
    if check.host:
        return name
    driver = check.call("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
    return f"{name}, {total / 2**30:.1f} GiB, driver {driver}, context {context / 2**20:.0f} MiB"


def kernels(check: Check) -> str:
    """Every kernel against the scalar one."""
    return check.call(BUILD / "test_cuda").splitlines()[-1]


def runs(check: Check) -> str:
    """Whole runs of small models against the processor alone."""
    return check.call(sys.executable, "benchmarks/gpu_runs.py", "--device", check.given.device)


def budget(check: Check) -> str:
    """What the card's driver says is used, against --vram."""
    return check.call(sys.executable, "benchmarks/gpu_budget.py", "--folder", check.given.folder)


def missing(check: Check) -> str:
    """Without the CUDA part, and without a card: one clear line, and the processor alone runs on."""
    ask = "from powerinfer_tools.engine.native import describe_card as d\ntry: d()\nexcept Exception as e: print(e)"
    run = "from benchmarks.gpu_runs import *\nwith tempfile.TemporaryDirectory() as d:\n"
    run += " write(MODELS['llama'], 'f16', 'gate', Path(d) / 'm')\n print(len(outputs(Model(Path(d) / 'm'), 'gate')))"
    no_library, no_card = {"POWERINFER_CUDA_LIB": "/nowhere/libpowerinfer_cuda.so"}, {"CUDA_VISIBLE_DEVICES": "-1"}
    said = [
        check.call(sys.executable, "-c", ask, **env) for env in ([no_library] if check.host else [no_library, no_card])
    ]
    for line in said:
        if not line or "\n" in line:
            raise Failed(f"expected one clear line, found {line!r}")
    check.call(sys.executable, "-c", run, **no_library)
    return "\n".join(said)


def sanitizer(check: Check) -> str:
    """compute-sanitizer on the small cases of kernels and of whole runs."""
    small: dict[str, list[Any]] = {
        "kernels": [BUILD / "test_cuda", "small"],
        "runs": [sys.executable, "benchmarks/gpu_runs.py", "--small"],
    }
    lines = []
    for tool, what in (("memcheck", "kernels"), ("racecheck", "kernels"), ("memcheck", "runs")):
        said = check.call("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *small[what])
        lines.append(f"{tool}, {what}: {said.splitlines()[-1]}")
    return "\n".join(lines)


def benchmarks(check: Check) -> str:
    """The table of gpu.py."""
    document = check.document
    check.given.time_limit = check.end - time.monotonic()
    left = gpu.fill(document, check.given, check.save, gpu.in_a_process)
    off = [key for key, row in document["rows"].items() if not sound(row)]
    if off:
        raise Failed("\n".join(["rows that failed, or whose logits or bytes are off:", *off]))
    if left:
        raise Left(f"{left} rows are left")
    return f"{len(document['rows'])} rows"


Step = Callable[[Check], str]
STEPS: dict[str, Step] = {
    "card": card,
    "kernels": kernels,
    "runs": runs,
    "budget": budget,
    "missing": missing,
    "sanitizer": sanitizer,
    "benchmarks": benchmarks,
}
ON_HOST = ("card", "runs", "missing", "benchmarks")


def perform(check: Check, name: str, step: Step) -> None:
    """One step, and what came of it."""
    start = time.monotonic()
    found = {"status": "ok", "detail": ""}
    try:
        found["detail"] = step(check)
    except (Failed, PowerinferError) as error:
        found = {"status": "FAILED", "detail": str(error)}
    except Left as error:
        found = {"status": "left", "detail": str(error)}
    check.document["steps"][name] = {**found, "seconds": time.monotonic() - start}
    check.save()
    gpu.say(f"gpu-check: {name}: {found['status']}, {time.monotonic() - start:.0f} s\n{found['detail']}")


def report(document: dict[str, Any]) -> str:
    """The steps, and the tables of the benchmarks."""
    lines = [["step", "status", "seconds"]]
    lines += [[name, step["status"], f"{step['seconds']:.0f}"] for name, step in document["steps"].items()]
    details = [f"{name}: {step['detail']}" for name, step in document["steps"].items() if step["detail"]]
    parts = [f"gpu-check on {document['card']}, {document['machine']['processor']}", table(lines), *details]
    return "\n\n".join([*parts, markdown(document)] if document["rows"] else parts)


def no_card() -> str | None:
    """Why there is none, in one line."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "nvidia-smi is not installed"
    return None if listed.returncode == 0 and "GPU" in listed.stdout else "nvidia-smi lists none"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=STEPS, help="else all, but for those done")
    parser.add_argument("-o", "--output", type=Path, default=Path("build/gpu-check"), help="folder of both files")
    gpu.add_options(parser)
    given = parser.parse_args()
    if given.device == "host":
        given.steps = [name for name in given.steps if name in ON_HOST]
    return given


def main() -> int:
    given = parse()
    if given.device == "cuda" and (why := no_card()):
        sys.exit(f"gpu-check: no card here, {why}; --device host checks what can be checked without one")
    check = Check(given, time.monotonic() + given.time_limit)
    try:
        if not check.host:
            build(check)
        check.document = {"steps": {}, **gpu.opened(given.output / "gpu-check.json", given.device)}
    except (Failed, Left, PowerinferError) as error:
        sys.exit(f"gpu-check: {error}")
    steps = check.document["steps"]
    for name in given.steps:
        if steps.get(name, {}).get("status") != "ok" and time.monotonic() < check.end:
            perform(check, name, STEPS[name])
    if any(step["status"] == "FAILED" for step in steps.values()):
        return 1
    return 0 if all(steps.get(name, {}).get("status") == "ok" for name in given.steps) else gpu.LEFT


if __name__ == "__main__":
    sys.exit(main())
