"""Files for the first PowerInfer: what its description asks for, the way back, and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
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
from powerinfer_tools.engine import Engine
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.predictors import Predictors, open_pretrained, take_predictors
from powerinfer_tools.progress import silent
from tests import pwri
from tests.checkpoint.test_huggingface import edit
from tests.gguf_bytes import F16, Q4_0
from tests.predictors.test_pretrained import write_pretrained
from tests.pwri import OPT_OFFSET, TOKENS, Model, write_counts
from tests.test_first_powerinfer import MACHINE, THRESHOLD, nmse
from tests.tiny import CORPUS, make_llama, make_opt
from tests.tiny_plain import make_falcon

Parts = tuple[Checkpoint, Activations, Predictors]


def parts_of(model: Path, source: Path, folder: Path) -> Parts:
    checkpoint = open_checkpoint(model)
    folder.mkdir(exist_ok=True)
    if not (folder / "counts").exists():
        write_counts(folder / "counts", checkpoint.config.n_layer, checkpoint.config.n_ff)
    activations = take_counts(checkpoint, folder / "counts", folder / "m.activations")
    predictors = take_predictors(checkpoint, activations, open_pretrained(source, checkpoint), folder / "m.predictors")
    return checkpoint, activations, predictors


def small(folder: Path, make: Callable[..., Path] = make_llama, **how: Any) -> Parts:
    """A folder and predictors beside it, as the first PowerInfer's converter takes them."""
    model = make(folder / "model", **{"n_layer": 12, "n_embd": 32, "n_ff": 64} | how)
    write_pretrained(folder / "old", threshold=0.5)
    return parts_of(model, folder / "old", folder)


@pytest.mark.parametrize("kind", [F16, Q4_0])
@pytest.mark.parametrize("arch", ["llama", "bamboo", "opt", "falcon"])
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
        rows = np.asarray(raw_rows(found, name))
        unread = OPT_OFFSET if name == "position_embd.weight" else 0  # the rows before position 0
        assert rows[unread:].tobytes() == data[unread * rows.shape[1] :], name
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


def falcon(folder: Path, **how: Any) -> Path:
    """With the pre-tokenizer of its published tokenizer.json, which files of theirs take for granted."""
    tokenizer = make_falcon(folder, **how) / "tokenizer.json"
    steps: list[dict[str, Any]] = [
        {"type": "Punctuation", "behavior": "Contiguous"},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        {"type": "Digits", "individual_digits": False},
        {"type": "Split", "pattern": {"Regex": "[0-9][0-9][0-9]"}, "behavior": "Isolated", "invert": False},
    ]
    edit(tokenizer, pre_tokenizer={"type": "Sequence", "pretokenizers": steps})
    return folder


MAKERS: dict[str, Callable[..., Path]] = {
    "llama": make_llama,
    "llama, tied": partial(make_llama, tied=True),
    "opt": make_opt,
    "falcon 7B": partial(falcon, tied=False),
    "falcon 7B, tied": falcon,
    "falcon 40B": partial(falcon, tied=False, n_head_kv=2, new_decoder_architecture=True, norms=("ln_attn", "ln_mlp")),
}


@pytest.mark.parametrize("name", MAKERS)
def test_there_and_back_is_the_same_model(name: str, tmp_path: Path) -> None:
    checkpoint, activations, predictors = small(tmp_path, MAKERS[name])
    out = tmp_path / "out"
    out.mkdir()
    write_pwri(checkpoint, activations, predictors, out / "m.powerinfer.gguf", quant="f16", progress=silent)
    given: dict[str, Any] = {"machine": MACHINE, "progress": silent, "quant": "f16"}
    back = build(out / "m.powerinfer.gguf", [], tmp_path / "back.gguf", **given)
    sources = {"counts": tmp_path / "counts", "pretrained": tmp_path / "old"}
    straight = build(tmp_path / "model", [], tmp_path / "straight.gguf", **given, **sources)
    added = {"output.weight"} if checkpoint.config.tied and name != "opt" else set()
    assert back.file.tensors.keys() == straight.file.tensors.keys() | added
    for name in straight.file.tensors:
        np.testing.assert_array_equal(raw_rows(back.file, name), raw_rows(straight.file, name), err_msg=name)
    tokens = torch.tensor([TOKENS])
    opened = open_checkpoint(out / "m.powerinfer.gguf")
    again, before = (reference.forward(checkpoint, tokens) for checkpoint in (opened, checkpoint))
    torch.testing.assert_close(again, before, atol=0.02, rtol=0.02)
    one, other = (Tokenizer.from_str(c.tokenizer_json) for c in (checkpoint, opened))
    assert one.encode(CORPUS, add_special_tokens=False).ids == other.encode(CORPUS, add_special_tokens=False).ids


@pytest.mark.parametrize("arch", ["llama", "opt", "falcon"])
def test_another_reader_computes_the_same(arch: str, tmp_path: Path) -> None:
    """tests.pwri reads it after the format's description alone: logits with no neuron left out, and every decision."""
    make = {"llama": partial(make_llama, n_head_kv=2), "opt": make_opt, "falcon": MAKERS["falcon 40B"]}[arch]
    folder = make(tmp_path / "model", n_layer=pwri.N_LAYER, n_embd=pwri.N_EMBD, n_ff=pwri.N_FF, n_head=pwri.N_HEAD)
    source = Model(threshold=THRESHOLD).write(tmp_path / "predictors.gguf")
    checkpoint, activations, predictors = parts_of(folder, source, tmp_path)
    write_pwri(checkpoint, activations, predictors, tmp_path / "m.powerinfer.gguf", progress=silent)
    model = pwri.read(arch, tmp_path / "m.powerinfer.gguf")
    model.threshold = THRESHOLD
    whole = reference.forward(checkpoint, torch.tensor([TOKENS]))[0].numpy()
    np.testing.assert_allclose(model.forward(TOKENS, "none", cache="<f8")[0], whole, atol=0.02, rtol=0.02)
    given: dict[str, Any] = {"counts": tmp_path / "counts", "pretrained": source, "quant": "f16", "machine": MACHINE}
    straight = build(folder, [], tmp_path / "straight.gguf", progress=silent, **given)
    expected, margins = model.forward(TOKENS)
    assert min(np.abs(margin).min() for margin in margins) > 1e-5
    with Engine(straight.path) as engine:
        logits, scores = engine.score(TOKENS)
    assert [score.n_predicted for score in scores] == [int((margin >= 0).sum()) for margin in margins]
    assert nmse(logits, expected) < 1e-6


def test_counts_lie_beside_it(tmp_path: Path) -> None:
    checkpoint, activations, predictors = small(tmp_path)
    write_pwri(checkpoint, activations, predictors, tmp_path / "m.powerinfer.gguf", progress=silent)
    for i in range(12):
        counts = torch.load(tmp_path / "activation" / f"activation_{i}.pt", weights_only=True)
        np.testing.assert_array_equal(counts.numpy(), activations.counts(i))
    with pytest.raises(PowerinferError, match=r"activation exists: use --force"):
        write_pwri(checkpoint, activations, predictors, tmp_path / "other.powerinfer.gguf", progress=silent)


def test_counts_of_more_layers_do_not_stay(tmp_path: Path) -> None:
    parts = small(tmp_path)
    stale = tmp_path / "activation" / "activation_12.pt"
    stale.parent.mkdir()
    torch.save(torch.ones(64), stale)
    write_pwri(*parts, tmp_path / "m.powerinfer.gguf", force=True, progress=silent)
    assert len(list(stale.parent.iterdir())) == 12


def test_predictors_of_other_activations_are_refused(tmp_path: Path) -> None:
    checkpoint, activations, predictors = small(tmp_path)
    other = replace(predictors, activations_digest="0" * 64)
    with pytest.raises(PowerinferError, match="made from another activations file"):
        write_pwri(checkpoint, activations, other, tmp_path / "m.gguf", progress=silent)
    assert not (tmp_path / "m.gguf").exists()


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
        (
            {"activation": "relu2"},
            "computes bamboo with drelu, falcon with relu, llama with relu, opt with relu, found llama with relu2",
        ),
        ({"activation": "fatrelu"}, "found llama with fatrelu"),
        ({"bias": True}, "computes no biases"),
        ({"head_dim": 16}, "heads that make up n_embd"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "computes plain rotary positions, found others"),
    ],
)
def test_what_their_engine_does_not_compute_is_refused(how: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(PowerinferError, match=message):
        write_pwri(*small(tmp_path, **how), tmp_path / "m.gguf", progress=silent)


@pytest.mark.parametrize(
    ("make", "how", "message"),
    [
        (make_opt, {"bias": False}, "computes all biases, found another model"),
        (make_opt, {"tied": False}, "computes opt whose output matrix is its embedding"),
        (make_falcon, {"bias": True}, "computes no biases, found another model"),
        (
            make_falcon,
            {"parallel_attn": False, "norms": ("input_layernorm", "post_attention_layernorm")},
            "computes falcon's FFN beside attention",
        ),
    ],
)
def test_what_opt_and_falcon_have_beyond_it_is_refused(
    make: Callable[..., Path], how: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(PowerinferError, match=message):
        write_pwri(*small(tmp_path, make, **how), tmp_path / "m.gguf", progress=silent)
