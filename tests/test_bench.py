"""The documents of bench and eval: their fields, and that their numbers are those of the run."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from powerinfer_tools.artifact import open_artifact
from powerinfer_tools.bench import CEILING_BYTES, bench, predicted_seconds
from powerinfer_tools.engine import Engine
from powerinfer_tools.engine.native import measure_file, measure_memory, measure_rows
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.evaluate import evaluate
from powerinfer_tools.placement.costs import kv_bytes
from powerinfer_tools.progress import silent
from powerinfer_tools.tokens import Tokenizer
from tests.artifacts import make_artifact
from tests.placement import worlds
from tests.tiny import CORPUS, make_llama

FIELDS = (
    "model quant mode threads runs prefill decode bytes_per_token ceiling_gb_s ceiling_share active_ratio "
    "predicted_ms_per_token peak_rss_bytes tiers breakdown output_hash disk card first_token_s"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    make_llama(folder / "model", n_ctx=128)
    make_llama(folder / "silu", activation="silu", n_ctx=128)
    make_artifact(folder / "model", folder / "exact.gguf")
    make_artifact(folder / "model", folder / "lossy.gguf", predictor=True, slack=-0.3)
    make_artifact(folder / "silu", folder / "cut.gguf", thresholds=(0.1, 0.1))
    (folder / "text.txt").write_text(CORPUS * 10, encoding="utf-8")
    return folder


def test_bench_counts_what_it_ran(folder: Path) -> None:
    found = bench(folder / "exact.gguf", prompt_tokens=16, n_tokens=8, repeats=2, threads=2, progress=silent)
    assert set(found) == set(FIELDS.split())
    assert found["decode"]["tokens"] == 8
    assert found["prefill"]["tokens"] == 16
    ms = found["decode"]["ms_per_token"]
    assert 0 < ms["p50"] <= ms["p90"] <= ms["p99"]
    assert found["predicted_ms_per_token"] > 0
    parts = found["breakdown"]
    assert sum(part["bytes"] for part in parts) == pytest.approx(found["bytes_per_token"])
    assert all(part["ms"] >= 0 for part in parts)
    assert 0 < found["active_ratio"] < 1


@pytest.mark.parametrize("name", ["exact", "lossy"])
def test_of_a_dense_run_all_bytes_but_predictors_are_foretold(folder: Path, name: str) -> None:
    artifact, machine = open_artifact(folder / f"{name}.gguf"), worlds.machine()
    unread = ("token_embd", "ffn_order", "ffn_frequency", "predictor", "rope")
    tensors = artifact.file.tensors.values()
    read = sum(tensor.n_bytes for tensor in tensors if not any(part in tensor.name for part in unread))
    read += kv_bytes(artifact.config, artifact.config.n_layer, 64) // 2
    foretold = predicted_seconds(artifact, machine, 64, dense=True)
    assert foretold == pytest.approx(read / machine.ram.sequential, rel=0.01)
    found = bench(artifact.path, mode="dense", prompt_tokens=8, n_tokens=4, repeats=1, threads=2, progress=silent)
    assert found["predicted_ms_per_token"] > 0


def test_peak_memory_is_that_of_running_not_of_measuring_the_machine(folder: Path) -> None:
    words = [sys.executable, "-m", "powerinfer_tools.cli.main", "bench", str(folder / "exact.gguf")]
    run = subprocess.run(
        [*words, "--prompt-tokens", "16", "--decode-tokens", "8", "--json"], check=True, capture_output=True, text=True
    )
    assert json.loads(run.stdout)["peak_rss_bytes"] < CEILING_BYTES / 4


def test_bench_refuses_what_it_cannot_run(folder: Path) -> None:
    with pytest.raises(PowerinferError, match="--decode-tokens: expected at most the model's 128 together, found 129"):
        bench(folder / "exact.gguf", prompt_tokens=64, n_tokens=65)
    with pytest.raises(PowerinferError, match="the prompt is empty"):
        bench(folder / "exact.gguf", prompt_tokens=8, n_tokens=8, text="")


def test_memory_is_measured_in_rows_that_are_read_whole() -> None:
    assert measure_memory(2, 1 << 20) > 0
    assert measure_rows(2, 1 << 20, 2304) > 0
    assert measure_rows(1, 1 << 20, row_bytes=18, stride_rows=3) > 0
    for row_bytes in (0, 64, 18 << 20):
        with pytest.raises(PowerinferError, match="expected a multiple of 18"):
            measure_rows(1, 1 << 20, row_bytes)


def test_a_file_is_measured_in_blocks_that_it_has(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(16384))
    with path.open("rb") as file:
        assert measure_file(file.fileno(), 8192, 7, 0.001) > 0
        for read_bytes, n_at_once, message in ((1000, 1, "a multiple of"), (4096, 0, "1 to 4096")):
            with pytest.raises(PowerinferError, match=message):
                measure_file(file.fileno(), read_bytes, n_at_once, 0.001)
        with pytest.raises(PowerinferError, match="a file of at least read_bytes"):
            measure_file(file.fileno(), 32768, 1, 0.001)


def test_bench_gives_the_same_tokens_for_any_threads_and_mode(folder: Path) -> None:
    how = {"prompt_tokens": 16, "n_tokens": 8, "repeats": 1, "progress": silent}
    runs = [
        bench(folder / "exact.gguf", threads=threads, mode=mode, **how)["output_hash"]
        for threads, mode in ((1, "auto"), (2, "auto"), (2, "dense"))
    ]
    assert len(set(runs)) == 1


def test_eval_of_an_exact_artifact_finds_no_difference(folder: Path) -> None:
    found = evaluate(folder / "exact.gguf", [folder / "text.txt"], n_tokens=256, window=64, progress=silent)
    assert set(found.as_dict()) == {"tokens", "perplexity", "top1_agreement", "kl_mean", "layers", "decoding"}
    assert found.perplexity["sparse"] == found.perplexity["dense"]
    assert found.top1_agreement == found.decoding["top1_agreement"] == 1
    assert found.kl_mean == 0
    assert all(layer["recall"] == 1 and 0 < layer["active_ratio"] < 1 for layer in found.layers)


def test_eval_perplexity_is_that_of_the_logits(folder: Path) -> None:
    found = evaluate(folder / "exact.gguf", [folder / "text.txt"], n_tokens=64, window=64, progress=silent)
    from powerinfer_tools.artifact import open_artifact

    artifact = open_artifact(folder / "exact.gguf")
    text = (folder / "text.txt").read_text(encoding="utf-8")
    ids = Tokenizer(artifact.tokenizer_json, artifact.special).encode(text, add_bos=False, parse_special=False)[:64]
    with Engine(folder / "exact.gguf") as engine:
        logits = engine.score(ids)[0].astype(np.float64)[:-1]
    log_p = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    log_p -= logits.max(-1, keepdims=True)
    expected = math.exp(-log_p[np.arange(63), ids[1:]].mean())
    assert found.tokens == 63
    assert found.perplexity["dense"] == pytest.approx(expected, rel=1e-5)


def test_eval_shows_what_predictors_and_cuts_cost(folder: Path) -> None:
    lossy = evaluate(folder / "lossy.gguf", [folder / "text.txt"], n_tokens=256, window=64, progress=silent)
    assert lossy.kl_mean > 0
    assert all(0 < layer["recall"] < 1 for layer in lossy.layers)
    assert lossy.decoding["kl_mean"] == pytest.approx(lossy.kl_mean, rel=1)
    cut = evaluate(folder / "cut.gguf", [folder / "text.txt"], n_tokens=256, window=64, progress=silent)
    assert cut.perplexity["uncut"] != cut.perplexity["dense"] == cut.perplexity["sparse"]


def test_eval_refuses_what_it_cannot_score(folder: Path) -> None:
    (folder / "short.txt").write_text("too short", encoding="utf-8")
    with pytest.raises(PowerinferError, match="expected at least 64 tokens"):
        evaluate(folder / "exact.gguf", [folder / "short.txt"], window=64)
    with pytest.raises(PowerinferError, match="expected a UTF-8 text file"):
        evaluate(folder / "exact.gguf", [folder / "exact.gguf"], window=64)
    with pytest.raises(PowerinferError, match="expected at least one text file"):
        evaluate(folder / "exact.gguf", [], window=64)
