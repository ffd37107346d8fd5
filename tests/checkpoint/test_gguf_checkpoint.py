"""GGUF checkpoints as llama.cpp writes them read as the models that they were made from."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize

from powerinfer_tools.checkpoint import open_checkpoint
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.reference import forward
from tests.tiny import TEMPLATE, make_llama
from tests.tiny_gguf import make_gguf, permute

TOKENS = torch.arange(80).reshape(2, 40)


def logits(path: Path, activation: str | None = None) -> torch.Tensor:
    return forward(open_checkpoint(path, activation), TOKENS)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"n_embd": 120, "n_head": 3, "n_head_kv": 1, "n_ff": 161, "tied": True},
        {"n_embd": 96, "n_head": 6, "n_head_kv": 2, "head_dim": 40, "bias": True},
    ],
    ids=["plain", "3:1, tied", "head_dim 40, biases"],
)
def test_float32_is_the_same_model(tmp_path: Path, shape: dict[str, Any]) -> None:
    folder = make_llama(tmp_path / "hf", activation="silu", **shape)
    path = make_gguf(tmp_path / "m.gguf", folder)
    ours, theirs = open_checkpoint(path), open_checkpoint(folder)
    assert ours.names() == theirs.names()
    for name in ours.names():
        np.testing.assert_array_equal(ours.read(name), theirs.read(name))
    assert torch.equal(logits(path), logits(folder))
    assert ours.config.tied == theirs.config.tied
    assert any("activation" in note for note in ours.notes)


def test_qwen2_rows_are_not_interleaved(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "hf", model_type="qwen2", activation="silu")
    ours = open_checkpoint(make_gguf(tmp_path / "m.gguf", folder, arch="qwen2", permuted=False))
    for name in (theirs := open_checkpoint(folder)).names():
        np.testing.assert_array_equal(ours.read(name), theirs.read(name))
    assert ours.biases == theirs.biases != frozenset()
    assert torch.equal(logits(tmp_path / "m.gguf"), logits(folder))


@pytest.mark.parametrize("kind", [Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0])
def test_quantised_types(tmp_path: Path, kind: Type) -> None:
    folder = make_llama(tmp_path / "hf")
    checkpoint = open_checkpoint(make_gguf(tmp_path / "m.gguf", folder, kind), "relu")
    original = open_checkpoint(folder)
    for name in ("blk.1.ffn_gate.weight", "blk.0.attn_q.weight", "token_embd.weight"):
        expected = dequantize(quantize(original.read(name), kind), kind)
        np.testing.assert_array_equal(checkpoint.read(name), expected)
        np.testing.assert_array_equal(checkpoint.read(name, slice(5, 37)), expected[5:37])


@pytest.mark.parametrize("kind", [Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K])
def test_k_quantised_rows(tmp_path: Path, kind: Type) -> None:
    """The gguf package reads these types but writes none, so the blocks are random bytes."""
    folder = make_llama(tmp_path / "hf", n_embd=256, n_ff=256, n_layer=1, n_vocab=280)
    path = make_gguf(tmp_path / "f32.gguf", folder)
    raw = _with_random_blocks(path, tmp_path / "k.gguf", "blk.0.ffn_up.weight", kind)
    expected = dequantize(raw, kind)
    found = open_checkpoint(tmp_path / "k.gguf", "relu").read("blk.0.ffn_up.weight", slice(3, 200))
    np.testing.assert_array_equal(found, expected[3:200])


def test_unreadable_type_is_named(tmp_path: Path) -> None:
    path = make_gguf(tmp_path / "m.gguf", make_llama(tmp_path / "hf"))
    data = bytearray(path.read_bytes())
    entry = b"output_norm.weight" + (1).to_bytes(4, "little") + (64).to_bytes(8, "little")
    at = data.index(entry) + len(entry)
    data[at : at + 4] = int(Type.I32).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(
        PowerinferError, match=r"output_norm\.weight: expected a type that can be dequantised, found I32"
    ):
        open_checkpoint(path, "relu").read("output_norm.weight")


def _with_random_blocks(path: Path, output: Path, name: str, kind: Type) -> np.ndarray:
    reader, writer = gguf.GGUFReader(path), gguf.GGUFWriter(output, "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            sub = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=sub)
    rng = np.random.default_rng(0)
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 60, (256, 256 // elements * size), dtype=np.uint8)  # below 0x3c: finite scales
    for tensor in reader.tensors:
        if tensor.name == name:
            writer.add_tensor(name, raw, raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return raw


def test_permutation_is_llama_cpps() -> None:
    """Rows of a head, halves a and b: a0 b0 a1 b1."""
    rows = np.array(["a0", "a1", "b0", "b1", "c0", "c1", "d0", "d1"])
    assert permute(rows, 2).tolist() == ["a0", "b0", "a1", "b1", "c0", "d0", "c1", "d1"]


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
YARN_KEYS = {
    "llama.rope.scaling.type": "yarn",
    "llama.rope.scaling.factor": 4.0,
    "llama.rope.scaling.original_context_length": 64,
}


@pytest.mark.parametrize(
    ("scaling", "keys"),
    [
        ({"type": "linear", "factor": 2.5}, {"llama.rope.scaling.factor": 2.5}),
        ({"type": "linear", "factor": 2.5}, {"llama.rope.scale_linear": 2.5}),
        (None, {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 2.5}),
        (YARN, YARN_KEYS),
        (
            {**YARN, "attention_factor": 0.5 * (0.1 * np.log(4.0) + 1)},
            YARN_KEYS | {"llama.rope.scaling.attn_factor": 0.5},
        ),
    ],
)
def test_rope_scaling(tmp_path: Path, scaling: dict[str, Any] | None, keys: dict[str, Any]) -> None:
    folder = make_llama(tmp_path / "hf", rope_scaling=scaling)
    expected = open_checkpoint(folder).config.rope
    found = open_checkpoint(make_gguf(tmp_path / "m.gguf", folder, keys=keys), "relu").config.rope
    assert expected is not None
    assert found is not None
    np.testing.assert_allclose(found.inv_freq, expected.inv_freq, rtol=1e-6)
    assert found.scale == pytest.approx(expected.scale)


def test_rope_factors(tmp_path: Path) -> None:
    """llama.cpp writes Llama 3.1's scaling as one divisor a frequency."""
    plain = open_checkpoint(make_llama(tmp_path / "plain")).config.rope
    folder = make_llama(tmp_path / "hf", rope_scaling=LLAMA3)
    expected = open_checkpoint(folder).config.rope
    assert plain is not None
    assert expected is not None
    factors = plain.inv_freq / expected.inv_freq
    assert factors.max() > 4
    path = make_gguf(tmp_path / "m.gguf", folder, rope_factors=factors)
    found = open_checkpoint(path, "relu").config.rope
    assert found is not None
    np.testing.assert_allclose(found.inv_freq, expected.inv_freq, rtol=1e-6)


def test_activation_from_the_user_and_from_our_key(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "hf", activation="relu")
    path = make_gguf(tmp_path / "m.gguf", folder)
    recorded = make_gguf(tmp_path / "k.gguf", folder, keys={"powerinfer.activation": "relu"})
    assert torch.equal(logits(path, "relu"), logits(folder))
    assert torch.equal(logits(recorded), logits(folder))
    assert not torch.equal(logits(path), logits(folder))  # silu by the format's definition
    assert open_checkpoint(path).digest() != open_checkpoint(path, "relu").digest()
    with pytest.raises(PowerinferError, match="records the activation relu, expected silu"):
        open_checkpoint(recorded, "silu")
    with pytest.raises(PowerinferError, match="relu, relu2, fatrelu, drelu, silu, found gelu"):
        open_checkpoint(path, "gelu")
    with pytest.raises(PowerinferError, match="activation_threshold: expected 2 numbers"):
        open_checkpoint(path, "fatrelu")


def test_thresholds_from_our_key(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "hf", activation="fatrelu")
    keys = {"powerinfer.activation": "fatrelu", "powerinfer.activation_threshold": [0.05, 0.05]}
    path = make_gguf(tmp_path / "m.gguf", folder, keys=keys)
    assert open_checkpoint(path).config.thresholds == pytest.approx((0.05, 0.05))
    torch.testing.assert_close(logits(path), logits(folder))


def test_texts(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "hf")
    keys = {"tokenizer.chat_template": TEMPLATE, "tokenizer.ggml.eot_token_id": 3}
    checkpoint = open_checkpoint(make_gguf(tmp_path / "m.gguf", folder, keys=keys), "relu")
    assert checkpoint.chat_template == TEMPLATE
    assert checkpoint.special["bos"] == 0
    assert checkpoint.special["eos"] == [1, 3]
    assert checkpoint.special["eos_token"] == "</s>"
    assert checkpoint.metadata == {"name": "tiny", "license": "apache-2.0"}


def test_sizes_a_layer(tmp_path: Path) -> None:
    """Newer writers give some sizes as one number a layer."""
    folder = make_llama(tmp_path / "hf")
    keys = {"llama.feed_forward_length": [160, 160], "llama.attention.head_count_kv": [2, 2]}
    assert open_checkpoint(make_gguf(tmp_path / "m.gguf", folder, keys=keys), "relu").config.n_ff == 160


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture key unknown": ({"llama.logit_scale": 2.0}, r"llama\.logit_scale: expected no such key"),
    "experts": ({"llama.expert_count": 8}, r"llama\.expert_used_count: expected an integer in 1..8"),
    "partial rotary": ({"llama.rope.dimension_count": 8}, "dimension_count: expected 16.*found 8"),
    "rope type": ({"llama.rope.scaling.type": "longrope"}, "expected none, linear or yarn, found 'longrope'"),
    "layers that are not there": ({"llama.block_count": 3}, r"expected blk\.2\.\S+ .*found none"),
    "fewer layers than tensors": ({"llama.block_count": 1}, r"blk\.1\.\S+: expected no such tensor"),
    "another width": (
        {"llama.feed_forward_length": 168},
        r"expected \[(168, 64|64, 168)\], found \[(160, 64|64, 160)\]",
    ),
    "widths that differ": ({"llama.feed_forward_length": [160, 96]}, "feed_forward_length: expected an integer"),
    "size missing": ({"llama.embedding_length": None}, "embedding_length: expected an integer.*found nothing"),
    "huge size": ({"llama.block_count": 2**31}, "block_count: expected an integer in 1..4096"),
    "not a number": ({"llama.rope.freq_base": float("nan")}, "freq_base: expected a number"),
    "our artifact": ({"powerinfer.version": 1}, "expected a checkpoint, found a powerinfer artifact"),
    "tokenizer model": ({"tokenizer.ggml.model": "bert"}, "expected gpt2 or llama, found 'bert'"),
    "pre-tokenizer": ({"tokenizer.ggml.pre": "tekken"}, "expected one of gpt-2, smollm.*found 'tekken'"),
    "eos outside": ({"tokenizer.ggml.eos_token_id": 300}, "eos_token_id: expected an integer in 0"),
    "template too long": ({"tokenizer.chat_template": "x" * (1 << 20)}, "chat_template: expected at most"),
    "merges malformed": ({"tokenizer.ggml.merges": ["a b c"]}, "merges: expected two pieces"),
    "merges of unknown tokens": ({"tokenizer.ggml.merges": ["qqq zzz"]}, "expected a tokenizer, found"),
    "tokens repeated": ({"tokenizer.ggml.tokens": ["a", "a"]}, "tokens: expected every token once"),
    "token too long": ({"tokenizer.ggml.tokens": ["a" * 4097]}, "tokens: expected tokens of at most 4096 characters"),
    "token of 10 MB": ({"tokenizer.ggml.tokens": ["a" * (10 << 20)]}, "tokens: expected tokens of at most 4096"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(tmp_path: Path, name: str) -> None:
    keys, message = REFUSED[name]
    path = make_gguf(tmp_path / "m.gguf", make_llama(tmp_path / "hf"), keys=keys)
    with pytest.raises(PowerinferError, match=message) as caught:
        open_checkpoint(path, "relu")
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
