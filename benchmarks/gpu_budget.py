"""Is the card's budget kept? What its driver says is used, before and while a model runs within --vram.

    python benchmarks/gpu_budget.py                    # some layers of LLaMA-2-7B's shape, Q4_0: under a minute

Used is what nvidia-smi says of the whole card, so nothing else may take or give back memory there meanwhile. It is read
with nothing of ours on the card and, in a process of its own for each budget, after a prompt and tokens.
"""

import argparse
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.gpu_row import HOTTEST, OURS, Case, all_contenders, ids, measured, on_card
from benchmarks.shapes import SHAPES, write_shape
from powerinfer_tools.engine import Engine

SHAPE, QUANT, ACTIVE = replace(SHAPES["llama-2-7b"], n_layer=4), "q4_0", 0.1
SHARES, PROMPT, DECODE, THREADS = (1.0, 0.5, 0.25, 0.1), 512, 32, 4


def used() -> int:
    """Bytes of the first card."""
    words = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"]
    return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout) << 20


def within(share: float, model: Path) -> tuple[int, int, int]:
    """(budget, bytes that the engine counts, bytes that the driver counts)"""
    before = used()
    case = Case(SHAPE, QUANT, ACTIVE, share, THREADS, "cuda", PROMPT, DECODE)
    contenders = {c.name: c for c in all_contenders(case, model, measured(case))}
    full = contenders.get(HOTTEST, contenders[OURS])  # spends the budget, whatever is faster
    loaded = full.open(model, case.device)
    prompt, tokens = ids(case, loaded)
    with Engine(loaded, ctx_size=case.ctx_size, threads=case.threads, mode=full.mode) as engine:
        engine.prefill(prompt)
        for token in tokens:
            engine.decode(token)
        return full.budget, on_card(engine), used() - before


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path(".cache/shapes"), help="where the model is written: 0.7 GB")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    model, kept = folder / "budget.gguf", True
    try:
        write_shape(SHAPE, QUANT, ACTIVE, model)
        for share in SHARES:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                budget, counted, seen = (n_bytes / 1e6 for n_bytes in pool.submit(within, share, model).result())
            kept = kept and counted <= budget and seen <= budget
            print(f"{share:.0%}: --vram {budget:.1f} MB, counted {counted:.1f}, used {seen:.1f} MB")
    finally:
        model.unlink(missing_ok=True)
    return int(not kept)


if __name__ == "__main__":
    sys.exit(main())
