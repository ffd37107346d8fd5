"""From the first PowerInfer's files to tokens: what is kept, which neurons are computed, what the program says."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from powerinfer_tools.artifact import Artifact, verify
from powerinfer_tools.artifact.layout import INPUT_STREAM
from powerinfer_tools.build import Stage, build
from powerinfer_tools.checkpoint.gguf_file import raw_rows
from powerinfer_tools.engine import Engine, native
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.placement import Machine, Tier
from powerinfer_tools.progress import silent
from tests import pwri
from tests.gguf_bytes import F16, Q4_0
from tests.predictors.test_pretrained import write_pretrained
from tests.pwri import TOKENS, Model, write_counts
from tests.tiny import CORPUS, make_llama

MACHINE = Machine("test", 2, Tier(8 << 30, 2e10, ((1 << 10, 1e10), (1 << 16, 2e10))))
THRESHOLD = 0.25


def converted(model: Model, folder: Path, corpus: list[Path] | None = None, **options: Any) -> Artifact:
    """The artifact of the model's file, with counts beside it unless there is a text."""
    path = model.write(folder / "old.powerinfer.gguf")
    if corpus is None and not (folder / "activation").exists():
        write_counts(folder / "activation")
    return build(path, corpus or [], folder / "new.gguf", machine=MACHINE, progress=silent, **options)


def stored(artifact: Artifact, name: str) -> npt.NDArray[np.uint8]:
    return np.asarray(raw_rows(artifact.file, name))


def nmse(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    return float(((found - expected) ** 2).sum() / (expected**2).sum())


@pytest.mark.parametrize("kind", [F16, Q4_0])
@pytest.mark.parametrize("arch", ["llama", "bamboo", "opt", "falcon"])
def test_weights_are_kept_bit_by_bit(arch: str, kind: int, tmp_path: Path) -> None:
    model = Model(arch, kind)
    artifact = converted(model, tmp_path)
    verify(artifact.path)
    assert artifact.quant == {F16: "f16", Q4_0: "q4_0"}[kind]

    def theirs(name: str) -> npt.NDArray[np.uint8]:
        _, shape, data = model.stored[name]
        return np.frombuffer(data, np.uint8).reshape(shape[1], -1)

    for name in ("token_embd.weight", "blk.11.attn_output.weight"):
        np.testing.assert_array_equal(stored(artifact, name), theirs(name))
    parts = ("gate", "up", "down_t") if model.gated else ("up", "down_t")
    for i in (0, 11):
        order, row = artifact.order(i), len(theirs(f"blk.{i}.ffn_up.weight")[0])
        bundles = stored(artifact, f"blk.{i}.ffn_neurons.weight").reshape(pwri.N_FF, len(parts), row)
        for r, part in enumerate(parts):
            np.testing.assert_array_equal(bundles[:, r], theirs(f"blk.{i}.ffn_{part}.weight")[order])
    if model.gated:  # the file has rows 2j and 2j + 1 of a head where the artifact has j and j + half
        rows = theirs("blk.5.attn_q.weight").reshape(pwri.N_HEAD, pwri.HEAD_DIM // 2, 2, -1)
        split = rows.swapaxes(1, 2).reshape(pwri.N_EMBD, -1)
        np.testing.assert_array_equal(stored(artifact, "blk.5.attn_q.weight"), split)


def test_a_finer_output_matrix_stays_fine(tmp_path: Path) -> None:
    """quantize leaves it finer than Q4_0, in a type that artifacts may not have: here Q5_0, 22 bytes for 32 numbers."""
    model, rng = Model("llama", Q4_0), np.random.default_rng(2)
    n = pwri.N_VOCAB * pwri.N_EMBD // 32
    scales = rng.uniform(0.01, 0.02, (n, 1)).astype("<f2")
    codes = rng.integers(0, 32, (n, 32))
    fifth = np.packbits(codes >> 4, axis=1, bitorder="little")
    packed = (codes[:, :16] & 15 | (codes[:, 16:] & 15) << 4).astype(np.uint8)
    numbers = ((codes - 16) * scales.astype(np.float64)).reshape(pwri.N_VOCAB, pwri.N_EMBD)
    data = np.concatenate([scales.view(np.uint8), fifth, packed], axis=1).tobytes()
    model.stored["output.weight"] = 6, (pwri.N_EMBD, pwri.N_VOCAB), data
    artifact = converted(model, tmp_path)
    verify(artifact.path)
    assert (artifact.quant, artifact.head) == ("q4_0", "q8_0")
    blocks = stored(artifact, "output.weight").reshape(-1, 34)  # a scale, and 32 numbers of a byte
    found = blocks[:, 2:].view(np.int8) * blocks[:, :2].copy().view("<f2").astype(np.float64)
    np.testing.assert_allclose(found.reshape(numbers.shape), numbers, atol=16 * 0.02 / 127)


def test_neurons_come_in_the_order_of_the_counts(tmp_path: Path) -> None:
    counts = write_counts(tmp_path / "activation")
    artifact = converted(Model(), tmp_path)
    for i in range(pwri.N_LAYER):
        np.testing.assert_array_equal(artifact.order(i), np.argsort(-counts[i], kind="stable"))


@pytest.mark.parametrize("kernels", [which for which in (1, 2, 3) if native.kernels(which)])
@pytest.mark.parametrize("arch", ["llama", "bamboo", "opt", "falcon"])
def test_the_predictors_decide_as_they_did(arch: str, kernels: int, tmp_path: Path) -> None:
    """In F16, every one of the 15360 decisions: a single other one would show in the logits."""
    model = Model(arch, threshold=THRESHOLD)
    artifact = converted(model, tmp_path)
    assert artifact.predictor_input == INPUT_STREAM
    assert artifact.predictor_relu
    expected, margins = model.forward(TOKENS)
    assert min(np.abs(margin).min() for margin in margins) > 1e-4
    with Engine(artifact.path, kernels=kernels) as engine:
        decoded = np.array([engine.decode(token, logits=True) for token in TOKENS])
        n_computed = engine.stats().neurons_computed
    with Engine(artifact.path, kernels=kernels) as engine:
        scored, scores = engine.score(TOKENS)
    predicted = [int((margin >= 0).sum()) for margin in margins]
    assert n_computed == sum(predicted)
    assert [score.n_predicted for score in scores] == predicted
    assert max(nmse(decoded, expected), nmse(scored, expected)) < 1e-6


def test_the_input_of_the_predictor_matters(tmp_path: Path) -> None:
    """So that the test above can fail: read behind the norm, the same predictors decide otherwise."""
    model = Model(threshold=THRESHOLD)
    before, behind = (model.forward(TOKENS, predictor)[1][0] >= 0 for predictor in ("stream", "ffn_input"))
    assert (before != behind).mean() > 0.02


@pytest.mark.parametrize("arch", ["llama", "opt"])
def test_blocks_of_four_bits_decide_nearly_so(arch: str, tmp_path: Path) -> None:
    """The engine rounds what it multiplies with Q4_0 to eight bits."""
    model = Model(arch, Q4_0, threshold=THRESHOLD)
    artifact = converted(model, tmp_path)
    _, margins = model.forward(TOKENS)
    with Engine(artifact.path) as engine:
        scores = engine.score(TOKENS)[1]
    for score, margin in zip(scores, margins, strict=True):
        assert abs(score.n_predicted - (margin >= 0).sum()) < 0.03 * margin.size


def test_with_a_text_it_is_profiled_and_keeps_its_predictors(tmp_path: Path) -> None:
    model, text = Model(threshold=THRESHOLD), tmp_path / "text.txt"
    text.write_text(CORPUS * 8)
    write_counts(tmp_path / "activation")
    stages: list[Stage] = []
    artifact = converted(model, tmp_path, [text], n_tokens=512, report=stages.append)
    assert [stage.name for stage in stages] == ["profile", "predictors", "place", "split"]
    assert set(artifact.provenance["inputs"]) == {"checkpoint", "activations", "predictors", "placement"}
    expected, _ = model.forward(TOKENS)
    with Engine(artifact.path) as engine:
        assert nmse(engine.score(TOKENS)[0], expected) < 1e-6


def test_a_folder_takes_predictors_and_counts_too(tmp_path: Path) -> None:
    model = make_llama(tmp_path / "model", n_layer=12, n_embd=32, n_ff=64)
    write_pretrained(tmp_path / "old", threshold=0.5)
    write_counts(tmp_path / "activation", 12, 64)
    given: dict[str, Any] = {"quant": "f32", "machine": MACHINE, "progress": silent, "counts": tmp_path / "activation"}
    without = build(model, [], tmp_path / "a.gguf", **given)
    assert set(without.modes) == {1}
    artifact = build(model, [], tmp_path / "b.gguf", pretrained=tmp_path / "old", **given)
    assert set(artifact.modes) == {2}
    assert artifact.predictor_input == INPUT_STREAM
    np.testing.assert_array_equal(stored(artifact, "blk.0.predictor_out.bias").view(np.float32), -0.5)


def test_a_second_build_does_nothing_and_another_is_told(tmp_path: Path) -> None:
    stages: list[Stage] = []
    first = converted(Model(), tmp_path).path.stat().st_mtime_ns
    again = converted(Model(), tmp_path, report=stages.append)
    assert again.path.stat().st_mtime_ns == first
    assert all(stage.up_to_date for stage in stages)
    counts = tmp_path / "activation" / "activation_5.pt"
    counts.write_bytes((tmp_path / "activation" / "activation_6.pt").read_bytes())
    with pytest.raises(PowerinferError, match=r"new.gguf exists, built with another counts"):
        converted(Model(), tmp_path)


def test_nothing_to_count_by_is_told(tmp_path: Path) -> None:
    with pytest.raises(
        PowerinferError, match=r"expected --corpus FILE.* or --counts FOLDER.*found neither, and no folder"
    ):
        converted(Model(), tmp_path, [])


def test_a_text_and_counts_are_one_too_many(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(CORPUS)
    with pytest.raises(PowerinferError, match="found both"):
        converted(Model(), tmp_path, [text], counts=tmp_path)
