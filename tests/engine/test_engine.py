"""The native engine against the reference, and against itself: modes, kernels, threads, batches."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch

from powerinfer_tools import reference
from powerinfer_tools.artifact import open_artifact
from powerinfer_tools.checkpoint import Checkpoint, open_checkpoint
from powerinfer_tools.engine import Engine, Sampling, native
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.placement import artifact_costs
from tests.artifacts import make_artifact, write_artifact
from tests.drawn import DrawnCheckpoint, drawn_config
from tests.tiny import make_llama, make_opt

FloatArray = npt.NDArray[np.float32]
GREEDY = Sampling(temperature=0)
N_VOCAB = 300
KERNELS = [which for which in (1, 2, 3) if native.kernels(which)]  # scalar, AVX2, AVX-512

FAMILIES: dict[str, Any] = {
    "llama": lambda folder: make_llama(folder, n_layer=3, n_embd=96, n_head=3, n_head_kv=1, head_dim=32),
    "odd": lambda folder: make_llama(
        folder, n_layer=12, n_embd=120, n_ff=333, n_head=6, n_head_kv=2, head_dim=40, tied=True, bias=True
    ),
    "drelu": lambda folder: make_llama(folder, activation="drelu"),
    "fatrelu": lambda folder: make_llama(folder, activation="fatrelu"),
    "relu2": lambda folder: make_llama(folder, activation="relu2"),
    "silu": lambda folder: make_llama(folder, activation="silu"),
    "opt": lambda folder: make_opt(folder, n_layer=12, n_embd=96, n_head=3, n_ff=224),
}


def ids(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, N_VOCAB, n).tolist()


def nmse(found: FloatArray, expected: FloatArray) -> float:
    assert np.isfinite(found).all()
    return float(((found - expected) ** 2).sum() / (expected**2).sum())


def decode_all(path: Path, tokens: list[int], **how: Any) -> FloatArray:
    with Engine(path, **how) as engine:
        rows = [engine.decode(token, logits=True) for token in tokens]
    return np.array(rows, np.float32)


def greedy_tokens(path: Path, prompt: list[int], n: int, **how: Any) -> list[int]:
    found = []
    with Engine(path, **how) as engine:
        engine.prefill(prompt)
        for _ in range(n):
            found.append(engine.sample(GREEDY))
            engine.decode(found[-1])
    return found


def reference_logits(checkpoint: Checkpoint, tokens: list[int]) -> FloatArray:
    with torch.no_grad():
        logits: FloatArray = reference.forward(checkpoint, torch.tensor([tokens]))[0].numpy()
    return logits


class Rounded(Checkpoint):
    """A checkpoint whose matrices hold what `quant` can hold: rounding them again changes nothing."""

    def __init__(self, inner: Checkpoint, quant: str) -> None:
        self.inner = inner
        self.kind = {"f16": "F16", "q8_0": "Q8_0", "q4_0": "Q4_0"}[quant]
        for name, value in vars(self.inner).items():
            if name in Checkpoint.__annotations__:
                setattr(self, name, value)

    def names(self) -> frozenset[str]:
        return self.inner.names()

    def digest(self) -> str:
        return self.inner.digest()

    def read(self, name: str, rows: slice | None = None) -> FloatArray:
        weight = self.inner.read(name)
        if weight.ndim == 2 and "ffn_router" not in name:
            weight = self.rounded(weight.T).T if "ffn_down" in name else self.rounded(weight)
        return weight if rows is None else weight[rows]

    def rounded(self, weight: FloatArray) -> FloatArray:
        kind = gguf.GGMLQuantizationType[self.kind if weight.shape[1] % 32 == 0 else "F16"]
        weight = np.ascontiguousarray(weight)
        return gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind).reshape(weight.shape)


@pytest.fixture(params=FAMILIES, scope="module")
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    FAMILIES[request.param](folder / "model")
    make_artifact(folder / "model", folder / "gate.gguf")
    make_artifact(folder / "model", folder / "predictor.gguf", predictor=True, slack=1e6)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make_llama(folder / "model")
    make_artifact(folder / "model", folder / "a.gguf", quant="q8_0")
    return folder / "a.gguf"


def test_dense_equals_reference(family: Path) -> None:
    tokens = ids(40)
    expected = reference_logits(open_checkpoint(family / "model"), tokens)
    with Engine(family / "gate.gguf", mode="dense") as engine:
        assert nmse(engine.score(tokens)[0], expected) <= 1e-6
    assert nmse(decode_all(family / "gate.gguf", tokens, mode="dense"), expected) <= 1e-6


def test_same_greedy_tokens_as_reference(family: Path) -> None:
    prompt, checkpoint = ids(8), open_checkpoint(family / "model")
    found = greedy_tokens(family / "gate.gguf", prompt, 64)
    expected = reference_logits(checkpoint, prompt + found[:-1])[len(prompt) - 1 :]
    assert found == expected.argmax(-1).tolist()


@pytest.mark.parametrize("quant", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("make", [make_llama, make_opt])
def test_quantised_equals_reference_on_the_same_weights(make: Any, quant: str, tmp_path: Path) -> None:
    make(tmp_path / "model", n_embd=128, n_ff=192)
    checkpoint, tokens = Rounded(open_checkpoint(tmp_path / "model"), quant), ids(40)
    write_artifact(checkpoint, tmp_path / "a.gguf", quant=quant)
    expected = reference_logits(checkpoint, tokens)
    # activations are rounded to 8 bits a block, as in ggml: about 0.4 % of a block's largest value each. Measured: 5e-5
    # to 1.0e-4 decoding, 7e-5 to 1.4e-4 in a batch, which rounds the columns of down to 8 bits, too
    bound = 1e-6 if quant == "f16" else 3e-4
    for kernels in KERNELS:
        with Engine(tmp_path / "a.gguf", kernels=kernels) as engine:
            assert nmse(engine.score(tokens)[0], expected) <= bound
    assert nmse(decode_all(tmp_path / "a.gguf", tokens), expected) <= bound


@pytest.mark.parametrize("kernels", KERNELS)
def test_modes_are_equal_bit_for_bit(family: Path, kernels: int) -> None:
    tokens = ids(24)
    dense = decode_all(family / "gate.gguf", tokens, mode="dense", kernels=kernels)
    for artifact, mode in (("gate", "gate"), ("gate", "auto"), ("predictor", "auto"), ("predictor", "gate")):
        found = decode_all(family / f"{artifact}.gguf", tokens, mode=mode, kernels=kernels)
        assert np.array_equal(found, dense), (artifact, mode)


@pytest.mark.parametrize("quant", ["f32", "f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("predictor", [False, True])
def test_threads_change_nothing(quant: str, predictor: bool, tmp_path: Path) -> None:
    make_llama(tmp_path / "model", n_embd=96, n_ff=320)
    path = tmp_path / "a.gguf"
    make_artifact(tmp_path / "model", path, quant=quant, predictor=predictor, rank=32)
    runs = [decode_all(path, ids(16), threads=n) for n in (1, 2, 3)]
    assert np.array_equal(runs[0], runs[1])
    assert np.array_equal(runs[0], runs[2])
    scored = []
    for n in (1, 2, 3):
        with Engine(path, threads=n) as engine:
            scored.append(engine.score(ids(150)))
    assert all(np.array_equal(logits, scored[0][0]) and layers == scored[0][1] for logits, layers in scored)
    tokens = [greedy_tokens(path, ids(150), 24, threads=n) for n in (1, 2, 3)]
    assert tokens[0] == tokens[1] == tokens[2]


@pytest.mark.parametrize("kernels", KERNELS[1:])
def test_kernels_agree(family: Path, kernels: int) -> None:
    tokens = ids(16)
    scalar = decode_all(family / "gate.gguf", tokens, kernels=1)
    found = decode_all(family / "gate.gguf", tokens, kernels=kernels)
    assert nmse(found, scalar) <= 1e-6  # sums in another order, rounded to the float16 cache


@pytest.mark.parametrize("quant", ["f32", "q8_0", "q4_0"])
@pytest.mark.parametrize("kernels", KERNELS)
def test_prompt_may_be_cut_anywhere(quant: str, kernels: int, tmp_path: Path) -> None:
    make_llama(tmp_path / "model", n_embd=96, n_ff=200)
    make_artifact(tmp_path / "model", tmp_path / "a.gguf", quant=quant)
    prompt = ids(200)
    with Engine(tmp_path / "a.gguf", kernels=kernels) as engine:
        whole = engine.prefill(prompt, logits=True)
        engine.truncate(0)
        engine.prefill(prompt[:1])
        engine.prefill(prompt[1:131])
        assert np.array_equal(engine.prefill(prompt[131:], logits=True), whole)
        assert engine.position == 200


def test_truncated_context_continues_as_if_never_longer(llama: Path) -> None:
    with Engine(llama) as engine:
        for token in ids(10):
            engine.decode(token)
        expected = engine.decode(7, logits=True)
        for token in ids(5, seed=1):
            engine.decode(token)
        engine.truncate(10)
        assert np.array_equal(engine.decode(7, logits=True), expected)


def test_sparse_prompt_scores_like_decoding(tmp_path: Path) -> None:
    make_llama(tmp_path / "model")
    make_artifact(tmp_path / "model", tmp_path / "a.gguf", predictor=True, slack=-0.2)
    tokens = ids(32)
    with Engine(tmp_path / "a.gguf") as engine:
        scored, layers = engine.score(tokens)
        engine.truncate(0)
        decoded = np.array([engine.decode(token, logits=True) for token in tokens])
    assert nmse(decoded, scored) <= 1e-4  # a logit at the threshold may fall on either side
    assert all(0 < layer.n_hit < layer.n_true for layer in layers), "the slack should cost some recall"


def test_predictor_lets_through_what_its_numbers_say(tmp_path: Path) -> None:
    make_llama(tmp_path / "model", n_layer=1)
    slack, always, tokens = -0.1, 5, ids(32)
    make_artifact(tmp_path / "model", tmp_path / "a.gguf", predictor=True, slack=slack, always=always)
    checkpoint = open_checkpoint(tmp_path / "model")
    with Engine(tmp_path / "a.gguf") as engine:
        score = engine.score(tokens)[1][0]
    with torch.no_grad():
        layer = reference.load_layer(checkpoint, 0)
        x = layer.attention(reference.embed(checkpoint, torch.tensor([tokens])))[1][0]
        order = open_artifact(tmp_path / "a.gguf").order(0)
        logit = (layer.ffn.select(x) + slack).numpy()[:, order]  # of full rank, it is the gate itself
        fires = (layer.ffn.neurons(x) != 0).numpy()[:, order]
    asked = logit >= 0
    asked[:, :always] = True
    close = int((np.abs(logit) < 1e-4).sum())
    assert abs(score.n_predicted - int(asked.sum())) <= close
    assert abs(score.n_hit - int((asked & fires).sum())) <= close
    assert abs(score.n_true - int(fires.sum())) <= close


@pytest.mark.parametrize("parallel", [False, True])
def test_predictor_reads_the_stream_where_it_is_said_to(tmp_path: Path, parallel: bool) -> None:
    """What the FFN's norm reads: the stream behind attention, or the layer's input where the two run side by side."""
    checkpoint, tokens, slack, always = DrawnCheckpoint(drawn_config(n_layer=1, parallel=parallel)), ids(32), 1.0, 5
    checkpoint.tensors["token_embd.weight"] *= 4  # so that the norm changes what passes
    write_artifact(checkpoint, tmp_path / "a.gguf", predictor=True, slack=slack, always=always, input="stream")
    with Engine(tmp_path / "a.gguf") as engine:
        score = engine.score(tokens)[1][0]
    with Engine(tmp_path / "a.gguf") as engine:
        for token in tokens:
            engine.decode(token)
        decoded = engine.stats().neurons_computed
    with torch.no_grad():
        entry = reference.embed(checkpoint, torch.tensor([tokens]))
        layer = reference.load_layer(checkpoint, 0)
        stream = (entry if parallel else layer.attention(entry)[0])[0]
        logits = [(layer.ffn.select(x) + slack).numpy() for x in (stream, layer.ffn_norm(stream))]
    order = open_artifact(tmp_path / "a.gguf").order(0)
    asked, behind_norm = (logit[:, order] >= 0 for logit in logits)
    asked[:, :always] = True
    behind_norm[:, :always] = True
    close = int((np.abs(logits[0]) < 1e-3).sum())
    assert abs(score.n_predicted - int(asked.sum())) <= close
    assert abs(decoded - int(asked.sum())) <= close
    assert abs(int(behind_norm.sum()) - int(asked.sum())) > 10 * close


def test_cut_silu_skips_and_uncut_does_not(tmp_path: Path) -> None:
    make_llama(tmp_path / "model", activation="silu")
    make_artifact(tmp_path / "model", tmp_path / "cut.gguf", thresholds=(0.1, 0.2))
    make_artifact(tmp_path / "model", tmp_path / "whole.gguf")
    checkpoint, tokens = open_checkpoint(tmp_path / "model"), ids(32)
    whole = reference_logits(checkpoint, tokens)
    checkpoint.config = checkpoint.config.with_thresholds((0.1, 0.2))
    cut = reference_logits(checkpoint, tokens)
    with Engine(tmp_path / "cut.gguf") as engine:
        found = np.array([engine.decode(token, logits=True) for token in tokens])
        assert nmse(found, cut) <= 1e-4  # a value at the threshold may fall on either side
        assert 0.05 < engine.stats().active_ratio < 0.95
    uncut = decode_all(tmp_path / "cut.gguf", tokens, uncut=True)
    assert nmse(uncut, whole) <= 1e-6
    assert nmse(cut, whole) > 1e-3
    assert np.array_equal(uncut, decode_all(tmp_path / "whole.gguf", tokens))


@pytest.mark.parametrize("predictor", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_memory_is_what_placement_counts(family: Path, predictor: bool, threads: int) -> None:
    artifact = open_artifact(family / ("predictor.gguf" if predictor else "gate.gguf"))
    biases = frozenset(name for name in artifact.file.tensors if name.endswith(".bias"))
    costs = artifact_costs(
        artifact.config, artifact.plans, quant=artifact.quant, biases=biases, ctx_size=100, threads=threads
    )
    with Engine(artifact.path, ctx_size=100, threads=threads) as engine:
        assert engine.info.weight_bytes == costs.weights
        assert engine.memory() == (costs.kv, costs.scratch)


@pytest.mark.parametrize("activation", ["relu", "drelu"])
def test_counters(activation: str, tmp_path: Path) -> None:
    make_llama(tmp_path / "model", activation=activation)
    artifact = make_artifact(tmp_path / "model", tmp_path / "a.gguf", quant="f16")
    config = artifact.config
    with Engine(tmp_path / "a.gguf", mode="dense") as engine:
        engine.decode(1)
        dense = engine.stats()
    with Engine(tmp_path / "a.gguf") as engine:
        engine.decode(1)
        sparse = engine.stats()
        assert engine.memory()[0] == 4 * config.n_layer * engine.ctx_size * config.n_head_kv * config.head_dim
    row = 2 * config.n_embd
    neurons = config.n_layer * config.n_ff
    assert dense.bytes_gate == sparse.bytes_gate == neurons * row
    assert dense.bytes_updown == (neurons + dense.neurons_active) * row  # down rows of silent neurons are not read
    if activation == "relu":
        assert sparse.bytes_updown == 2 * sparse.neurons_active * row
    else:  # the up row may silence a neuron whose gate fires
        assert 2 * sparse.neurons_active * row < sparse.bytes_updown < dense.bytes_updown
    assert dense.neurons_active == sparse.neurons_active < sparse.neurons_total == neurons
    assert dense.bytes_head == config.n_vocab * row
    assert dense.bytes_decode == dense.bytes_attention + dense.bytes_gate + dense.bytes_updown + dense.bytes_head


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.decode(N_VOCAB), "token ids from 0 to 299, found 300"),
        (lambda e: e.decode(-1), "token ids from 0 to 299, found -1"),
        (lambda e: e.prefill(ids(17)), "at most 16 more tokens in a context of 16, found 17"),
        (lambda e: e.prefill([]), "at least one token"),
        (lambda e: e.truncate(1), "position of at most 0, found 1"),
        (lambda e: e.sample(GREEDY), "nothing to sample from"),
    ],
)
def test_bad_calls_say_what_was_expected(llama: Path, call: Any, message: str) -> None:
    with Engine(llama, ctx_size=16) as engine, pytest.raises(PowerinferError, match=message):
        call(engine)


def damage(source: Path, output: Path, tensor: str, value: float) -> Path:
    found, data = open_artifact(source).file.tensors[tensor], bytearray(source.read_bytes())
    data[found.offset : found.offset + 4] = np.float32(value).tobytes()
    output.write_bytes(data)
    return output


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_damaged_weights_are_never_sampled_from(family: Path, value: float, tmp_path: Path) -> None:
    path = damage(family / "gate.gguf", tmp_path / "a.gguf", "output_norm.weight", value)
    with Engine(path) as engine:
        engine.decode(1)
        with pytest.raises(PowerinferError, match="a logit is not a finite number"):
            engine.sample(GREEDY)


def test_a_damaged_forecast_costs_no_answer(tmp_path: Path) -> None:
    make_llama(tmp_path / "model")
    make_artifact(tmp_path / "model", tmp_path / "a.gguf", predictor=True, slack=1e6)
    path = damage(tmp_path / "a.gguf", tmp_path / "b.gguf", "blk.0.predictor_in.weight", np.nan)
    tokens = ids(16)
    assert np.array_equal(decode_all(path, tokens), decode_all(path, tokens, mode="dense"))
    with Engine(path) as sparse, Engine(path, mode="dense") as dense:
        assert np.array_equal(sparse.score(tokens)[0], dense.score(tokens)[0])


def test_too_little_memory_for_threads_is_an_error(llama: Path) -> None:
    code = """
import resource, sys
from powerinfer_tools.engine import Engine, Model
model = Model(sys.argv[1])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)
try:
    Engine(model, threads=256)
except Exception as error:
    print(error.kind, error)
Engine(model, threads=1).decode(1)
"""
    run = subprocess.run([sys.executable, "-c", code, str(llama)], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "memory cannot start 256 threads\n"), run.stderr


def test_bad_settings_say_what_was_expected(llama: Path) -> None:
    with pytest.raises(PowerinferError, match="--ctx-size: expected at most the model's 256, found 257"):
        Engine(llama, ctx_size=257)
    with pytest.raises(PowerinferError, match="mode: expected auto, dense, gate, predictor, found fast"):
        Engine(llama, mode="fast")
    with pytest.raises(PowerinferError, match="n_threads: expected 1 to 256"):
        Engine(llama, threads=257)


def test_context_may_be_filled_to_the_last_position(llama: Path) -> None:
    with Engine(llama, ctx_size=16) as engine:
        engine.prefill(ids(15))
        engine.decode(3)
        with pytest.raises(PowerinferError, match="at most 0 more tokens"):
            engine.decode(3)
