"""Files for the first PowerInfer: what its description asks for, the way back, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from powerinfer_tools import reference
from powerinfer_tools.activations import Activations, take_counts
from powerinfer_tools.artifact.pwri_writer import write_pwri
from powerinfer_tools.build import build
from powerinfer_tools.checkpoint import Checkpoint, open_checkpoint
from powerinfer_tools.checkpoint.gguf_file import PWRI, raw_rows, read_gguf
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.predictors import Predictors, take_predictors
from powerinfer_tools.progress import silent
from tests.gguf_bytes import F16, Q4_0
from tests.predictors.test_pretrained import write_pretrained
from tests.pwri import TOKENS, Model, write_counts
from tests.test_first_powerinfer import MACHINE
from tests.tiny import CORPUS, make_llama, make_opt

Parts = tuple[Checkpoint, Activations, Predictors]


def parts_of(model: Path, source: Path, folder: Path) -> Parts:
    checkpoint = open_checkpoint(model)
    folder.mkdir(exist_ok=True)
    if not (folder / "counts").exists():
        write_counts(folder / "counts", checkpoint.config.n_layer, checkpoint.config.n_ff)
    activations = take_counts(checkpoint, folder / "counts", folder / "m.activations")
    predictors = take_predictors(checkpoint, activations, source, folder / "m.predictors", progress=silent)
    return checkpoint, activations, predictors


def small(folder: Path, **how: Any) -> Parts:
    """A folder and predictors beside it, as the first PowerInfer's converter takes them."""
    model = make_llama(folder / "model", **{"n_layer": 12, "n_embd": 32, "n_ff": 64} | how)
    write_pretrained(folder / "old", threshold=0.5)
    return parts_of(model, folder / "old", folder)


@pytest.mark.parametrize("kind", [F16, Q4_0])
@pytest.mark.parametrize("arch", ["llama", "bamboo"])
def test_a_file_of_theirs_comes_out_as_it_went_in(arch: str, kind: int, tmp_path: Path) -> None:
    model = Model(arch, kind, threshold=0.25)
    if kind == Q4_0:  # what a quantiser would choose: it is rounded anew
        model = requantised(model)
    path = model.write(tmp_path / "old.gguf")
    written = tmp_path / "out" / "new.powerinfer.gguf"
    written.parent.mkdir()
    write_pwri(*parts_of(path, path, tmp_path), written, quant={F16: "f16", Q4_0: "q4_0"}[kind], progress=silent)
    found = read_gguf(written, strict=False, magic=PWRI)
    assert written.read_bytes()[:4] == b"PWRI"
    assert {name: (t.type, t.shape) for name, t in found.tensors.items()} == {
        name: (type, shape) for name, (type, shape, _) in model.stored.items()
    }
    for name, (_, _, data) in model.stored.items():
        assert np.asarray(raw_rows(found, name)).tobytes() == data, name
    before = read_gguf(path, strict=False, magic=PWRI).metadata
    for key, value in before.items():
        if key.startswith((f"{arch}.", "powerinfer.", "general.arch")) or key.endswith(("tokens", "token_type", "_id")):
            assert found.metadata[key] == value, key


def requantised(model: Model) -> Model:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    for name, (kind, shape, data) in model.stored.items():
        if kind == Q4_0:
            rows = dequantize(np.frombuffer(data, np.uint8).reshape(shape[1], -1), GGMLQuantizationType.Q4_0)
            model.stored[name] = kind, shape, quantize(rows, GGMLQuantizationType.Q4_0).tobytes()
    return model


def test_there_and_back_is_the_same_model(tmp_path: Path) -> None:
    checkpoint, activations, predictors = small(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    write_pwri(checkpoint, activations, predictors, out / "m.powerinfer.gguf", quant="f16", progress=silent)
    given: dict[str, Any] = {"machine": MACHINE, "progress": silent, "quant": "f16"}
    back = build(out / "m.powerinfer.gguf", [], tmp_path / "back.gguf", **given)
    sources = {"counts": tmp_path / "counts", "pretrained": tmp_path / "old"}
    straight = build(tmp_path / "model", [], tmp_path / "straight.gguf", **given, **sources)
    assert back.file.tensors.keys() == straight.file.tensors.keys()
    for name in straight.file.tensors:
        np.testing.assert_array_equal(raw_rows(back.file, name), raw_rows(straight.file, name), err_msg=name)
    tokens = torch.tensor([TOKENS])
    opened = open_checkpoint(out / "m.powerinfer.gguf")
    again, before = (reference.forward(checkpoint, tokens) for checkpoint in (opened, checkpoint))
    torch.testing.assert_close(again, before, atol=0.02, rtol=0.02)
    one, other = (Tokenizer.from_str(c.tokenizer_json) for c in (checkpoint, opened))
    assert one.encode(CORPUS, add_special_tokens=False).ids == other.encode(CORPUS, add_special_tokens=False).ids


def test_counts_lie_beside_it(tmp_path: Path) -> None:
    checkpoint, activations, predictors = small(tmp_path)
    write_pwri(checkpoint, activations, predictors, tmp_path / "m.powerinfer.gguf", progress=silent)
    for i in range(12):
        counts = torch.load(tmp_path / "activation" / f"activation_{i}.pt", weights_only=True)
        np.testing.assert_array_equal(counts.numpy(), activations.counts(i))
    with pytest.raises(PowerinferError, match=r"activation exists: use --force"):
        write_pwri(checkpoint, activations, predictors, tmp_path / "other.powerinfer.gguf", progress=silent)


def test_other_types_are_refused(tmp_path: Path) -> None:
    parts = small(tmp_path)
    for quant in ("f32", "q8_0"):
        with pytest.raises(PowerinferError, match=rf"computes F16 and Q4_0, found --quant {quant}"):
            write_pwri(*parts, tmp_path / "m.gguf", quant=quant, progress=silent)
    assert not (tmp_path / "m.gguf").exists()


def test_predictors_of_our_own_are_refused(tmp_path: Path) -> None:
    checkpoint, activations, predictors = small(tmp_path)
    for other in (replace(predictors, input="ffn_input"), replace(predictors, relu=False)):
        with pytest.raises(PowerinferError, match=r"computes predictors with relu that read the stream.*--pretrained"):
            write_pwri(checkpoint, activations, other, tmp_path / "m.gguf", progress=silent)
    gate = [replace(predictors.plans[0], mode=1), *predictors.plans[1:]]
    with pytest.raises(PowerinferError, match="computes every layer with a predictor, found layer 0 without"):
        write_pwri(checkpoint, activations, replace(predictors, plans=gate), tmp_path / "m.gguf", progress=silent)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"activation": "silu"}, "computes llama with relu, bamboo with drelu, found llama with silu"),
        ({"activation": "fatrelu"}, "found llama with fatrelu"),
        ({"bias": True}, "computes no biases"),
        ({"tied": True}, "computes no biases, an output matrix"),
        ({"head_dim": 16}, "heads that make up n_embd"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "computes plain rotary positions, found others"),
    ],
)
def test_what_their_engine_does_not_compute_is_refused(how: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(PowerinferError, match=message):
        write_pwri(*small(tmp_path, **how), tmp_path / "m.gguf", progress=silent)


def test_opt_is_not_written(tmp_path: Path) -> None:
    model = make_opt(tmp_path / "model", n_layer=12, n_embd=32, n_ff=64)
    write_pretrained(tmp_path / "old")
    with pytest.raises(PowerinferError, match="found opt with relu"):
        write_pwri(*parts_of(model, tmp_path / "old", tmp_path), tmp_path / "m.gguf", progress=silent)
