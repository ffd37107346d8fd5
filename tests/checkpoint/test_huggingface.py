"""Hugging Face folders: what is read, how little of it, and what is refused by name."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from powerinfer_tools.checkpoint import check_finite, open_checkpoint
from powerinfer_tools.errors import PowerinferError
from tests.tiny import TEMPLATE, make_llama, make_opt


def edit(path: Path, **values: Any) -> None:
    """Sets fields of a JSON file; None removes one."""
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_config(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_llama(tmp_path / "tiny", n_embd=96, n_head=6, head_dim=40, n_layer=3))
    config = checkpoint.config
    assert (config.arch, config.name, config.gated, config.tied) == ("llama", "tiny", True, False)
    assert (config.n_layer, config.n_embd, config.n_head, config.n_head_kv, config.head_dim) == (3, 96, 6, 2, 40)
    assert (config.activation, config.thresholds, config.norm_eps) == ("relu", (0.0, 0.0, 0.0), 1e-5)
    assert config.rope is not None
    assert config.rope.inv_freq.shape == (20,)
    assert checkpoint.biases == frozenset()
    assert not checkpoint.notes


def test_opt(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_opt(tmp_path, n_ctx=32))
    assert (checkpoint.config.arch, checkpoint.config.gated, checkpoint.config.tied) == ("opt", False, True)
    assert checkpoint.config.rope is None
    assert "blk.0.attn_norm.bias" in checkpoint.biases
    positions = load_file(tmp_path / "model.safetensors")["model.decoder.embed_positions.weight"]
    np.testing.assert_array_equal(checkpoint.read("position_embd.weight"), positions[2:])
    np.testing.assert_array_equal(checkpoint.read("position_embd.weight", slice(30, 32)), positions[32:])


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_read(tmp_path: Path, dtype: str, shards: int) -> None:
    exact = load_file(make_llama(tmp_path / "exact") / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    checkpoint = open_checkpoint(make_llama(tmp_path / "m", dtype=dtype, shards=shards))
    whole = checkpoint.read("blk.1.ffn_up.weight")
    assert whole.dtype == np.float32
    np.testing.assert_allclose(whole, exact, rtol={"F32": 0, "F16": 1e-3, "BF16": 2**-7}[dtype], atol=1e-6)
    np.testing.assert_array_equal(checkpoint.read("blk.1.ffn_up.weight", slice(7, 30)), whole[7:30])
    assert checkpoint.read("blk.1.ffn_up.weight", slice(5, 5)).shape == (0, 64)
    np.testing.assert_array_equal(
        checkpoint.read("output_norm.weight", slice(3, 9)), checkpoint.read("output_norm.weight")[3:9]
    )
    with pytest.raises(PowerinferError, match=r"expected the tensor blk\.2\.ffn_up\.weight, found none"):
        checkpoint.read("blk.2.ffn_up.weight")


def test_opening_reads_no_weights(tmp_path: Path) -> None:
    """A sparse file of 8 GB opens at once."""
    folder = make_llama(tmp_path)
    edit(folder / "config.json", vocab_size=1 << 24)
    path = folder / "model.safetensors"
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):  # their old place is left to a filler
        size = (1 << 24) * 64 * 4
        begin, stop = header[name]["data_offsets"]
        header[f"{name}.rotary_emb.inv_freq"] = {"dtype": "U8", "shape": [stop - begin], "data_offsets": [begin, stop]}
        header[name] = {"dtype": "F32", "shape": [1 << 24, 64], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + data[8 + n :])
        file.truncate(8 + len(text) + end)
    checkpoint = open_checkpoint(folder)
    assert not checkpoint.read("token_embd.weight", slice((1 << 24) - 2, 1 << 24)).any()


def test_texts(tmp_path: Path) -> None:
    folder = make_llama(tmp_path)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tokenizer_json == (folder / "tokenizer.json").read_text()
    assert checkpoint.chat_template == TEMPLATE
    assert checkpoint.special == {
        "bos": 0,
        "eos": [1],
        "add_bos": True,  # its tokenizer.json says so
        "bos_token": "<s>",
        "eos_token": "</s>",
    }


def test_texts_of_other_places(tmp_path: Path) -> None:
    folder = make_llama(tmp_path)
    (folder / "chat_template.jinja").write_text("from the file")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 1]}))
    edit(folder / "tokenizer_config.json", add_bos_token=False, eos_token={"content": "<|im_end|>"})
    checkpoint = open_checkpoint(folder)
    assert checkpoint.chat_template == "from the file"
    assert checkpoint.special["eos"] == [3, 1]
    assert checkpoint.special["eos_token"] == "<|im_end|>"
    assert checkpoint.special["add_bos"] is False


def test_no_end_of_text(tmp_path: Path) -> None:
    folder = make_llama(tmp_path)
    edit(folder / "config.json", eos_token_id=None)
    edit(folder / "tokenizer_config.json", eos_token=None, chat_template=None)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.special["eos"] == []
    assert checkpoint.chat_template is None
    assert checkpoint.notes


def test_digest(tmp_path: Path) -> None:
    """Equal for equal bytes wherever they lie; another for one changed weight, field or token."""
    first = open_checkpoint(make_llama(tmp_path / "a")).digest()
    assert open_checkpoint(make_llama(tmp_path / "b")).digest() == first
    seen = {first, open_checkpoint(make_llama(tmp_path / "c", seed=1)).digest()}
    edit(tmp_path / "a" / "config.json", rope_theta=500.0)
    edit(tmp_path / "b" / "tokenizer_config.json", add_bos_token=False)
    seen |= {open_checkpoint(tmp_path / "a").digest(), open_checkpoint(tmp_path / "b").digest()}
    assert len(seen) == 4


def test_digest_is_of_the_checkpoint_not_of_its_cut(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_llama(tmp_path, activation="silu"))
    before = checkpoint.digest()
    checkpoint.config = checkpoint.config.with_thresholds((0.1, 0.2))
    assert checkpoint.digest() == before


def test_activation_must_agree(tmp_path: Path) -> None:
    folder = make_llama(tmp_path)
    assert open_checkpoint(folder, "relu").config.activation == "relu"
    with pytest.raises(PowerinferError, match="says the activation relu, expected silu"):
        open_checkpoint(folder, "silu")


def test_sliding_window_limits_the_context(tmp_path: Path) -> None:
    folder = make_llama(tmp_path, model_type="mistral")
    assert open_checkpoint(folder).config.n_ctx == 256
    edit(folder / "config.json", sliding_window=64)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config.n_ctx == 64
    assert "64 positions" in checkpoint.notes[0]


def test_check_finite() -> None:
    weights = np.ones((3, 4), np.float32)
    check_finite("blk.0.ffn_up.weight", weights)
    weights[1, 2] = np.nan
    with pytest.raises(
        PowerinferError, match=r"blk\.0\.ffn_up\.weight: expected finite weights, found nan at \[1, 2\]"
    ):
        check_finite("blk.0.ffn_up.weight", weights)
    weights[1, 2] = -np.inf
    with pytest.raises(PowerinferError, match=r"found -inf at \[101, 2\]"):
        check_finite("x", weights, first_row=100)


LLAMA_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "model_type": ({"model_type": "gemma"}, "model_type: expected one of .*llama, mistral, .*, found 'gemma'"),
    "own code": ({"architectures": ["SparseLlamaForCausalLM"]}, "architectures: expected"),
    "hidden_act": ({"hidden_act": "gelu"}, "hidden_act: expected one of relu, .*silu.*, found 'gelu'"),
    "a number beyond floats": ({"rms_norm_eps": 10**400}, "rms_norm_eps: expected a number above 0, at most 1"),
    "no hidden_act": ({"hidden_act": None}, "hidden_act: expected a string, found nothing"),
    "fatrelu without threshold": ({"hidden_act": "fatrelu"}, "hidden_act_param: expected a number"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config: expected float weights"),
    "partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1"),
    "rope type": ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type: expected one of default.*found 'longrope'"),
    "rope factor": (
        {"rope_scaling": {"rope_type": "linear"}},
        "rope_scaling: factor: expected a number, found nothing",
    ),
    "rope a list": ({"rope_scaling": [1]}, "rope_scaling: expected an object"),
    "heads": ({"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor of 4, found 3"),
    "head_dim odd": ({"head_dim": 15}, "head_dim: expected an even number"),
    "negative": ({"num_hidden_layers": -2}, "num_hidden_layers: expected an integer in 1..4096, found -2"),
    "huge": ({"hidden_size": 2**62}, "hidden_size: expected an integer"),
    "text": ({"vocab_size": "300"}, "vocab_size: expected an integer"),
    "true": ({"vocab_size": True}, "vocab_size: expected an integer"),
    "eps": ({"rms_norm_eps": 0}, "rms_norm_eps: expected a number above 0"),
    "infinite": ({"rope_theta": float("inf")}, "rope_theta: expected a number"),
    "layer missing": ({"num_hidden_layers": 3}, r"expected model\.layers\.2\.\S+ \[.*\], found none"),
    "layer too many": ({"num_hidden_layers": 1}, r"model\.layers\.1\.\S+: expected no such tensor"),
    "shape": ({"vocab_size": 299}, r"embed_tokens\.weight: expected \[299, 64\], found \[300, 64\]"),
    "bias missing": ({"mlp_bias": True}, r"expected model\.layers\.0\.mlp\.\S+\.bias \[\d+\], found none"),
    "eos": ({"eos_token_id": 300}, "expected ids below 300, found 300"),
}


@pytest.mark.parametrize("name", LLAMA_FIELDS)
def test_llama_field_refused(tmp_path: Path, name: str) -> None:
    values, message = LLAMA_FIELDS[name]
    assert_refused(make_llama(tmp_path), message, lambda folder: edit(folder / "config.json", **values))


OPT_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "norm after": ({"do_layer_norm_before": False}, "do_layer_norm_before: expected true, found False"),
    "projections": ({"word_embed_proj_dim": 32}, "word_embed_proj_dim: expected hidden_size 64"),
    "activation": ({"activation_function": "gelu"}, "activation_function: expected relu, found 'gelu'"),
    "no norm weights": ({"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine: expected true"),
    "no final norm": ({"_remove_final_layer_norm": True}, "_remove_final_layer_norm: expected false"),
    "biases": ({"enable_bias": False}, r"fc1\.bias|_proj\.bias: expected no such tensor"),
}


@pytest.mark.parametrize("name", OPT_FIELDS)
def test_opt_field_refused(tmp_path: Path, name: str) -> None:
    values, message = OPT_FIELDS[name]
    assert_refused(make_opt(tmp_path), message, lambda folder: edit(folder / "config.json", **values))


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def extra_tensor(folder: Path) -> None:
    from safetensors.numpy import save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(16, np.float32)
    save_file(tensors, folder / "model.safetensors")


def index_names(name: str) -> Callable[[Path], None]:
    """An index whose every tensor is in the file `name`."""

    def damage(folder: Path) -> None:
        weight_map = dict.fromkeys(load_file(folder / "model.safetensors"), name)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return damage


def write(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data) and None


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)


def long_token(folder: Path) -> None:
    """A token of 10 MB."""
    path = folder / "tokenizer.json"
    description = json.loads(path.read_text())
    description["added_tokens"].append(description["added_tokens"][0] | {"id": 299, "content": "a" * (10 << 20)})
    path.write_text(json.dumps(description))


def huge(name: str) -> Callable[[Path], None]:
    """A file of 1 GB that takes no room."""
    return lambda folder: os.truncate(folder / name, 1 << 30)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "only a pickle": (only_pickle, "found pytorch_model.bin: a pickle can run code"),
    "no weights": (remove("model.safetensors"), "expected model.safetensors or .*index.json, found neither"),
    "shard missing": (index_names("model-7.safetensors"), "expected the shard model-7.safetensors"),
    "shard elsewhere": (index_names("../../etc/passwd"), r"expected a \.safetensors file of this folder"),
    "shard by path": (index_names("/etc/x.safetensors"), r"expected a \.safetensors file of this folder"),
    "shard above": (index_names("../m.safetensors"), r"expected a \.safetensors file of this folder"),
    "shard a pickle": (index_names("model.bin"), r"expected a \.safetensors file of this folder"),
    "index no map": (write("model.safetensors.index.json", b'{"weight_map": 3}'), "weight_map: expected names"),
    "weights cut": (cut_weights, "expected safetensors, found"),
    "weights of rubbish": (write("model.safetensors", b"\xff" * 64), "expected safetensors, found"),
    "unknown tensor": (extra_tensor, r"q_norm\.weight: expected no such tensor"),
    "no config": (remove("config.json"), "config.json: expected this file, found none"),
    "config of 1 GB": (huge("config.json"), "config.json: expected at most 1048576 bytes, found 1073741824"),
    "config nested": (write("config.json", b"[" * 200_000), "config.json: expected JSON, found it nested too deeply"),
    "config no JSON": (write("config.json", b"{,}"), "config.json: expected JSON, found"),
    "config a list": (write("config.json", b"[]"), "config.json: expected a JSON object, found list"),
    "config no text": (write("config.json", b"\xff\xfe"), "config.json: expected UTF-8"),
    "no tokenizer": (remove("tokenizer.json"), "tokenizer.json: expected this file, found none"),
    "tokenizer rubbish": (write("tokenizer.json", b"{}"), "tokenizer.json: expected a tokenizer, found"),
    "tokenizer of 1 GB": (huge("tokenizer.json"), "tokenizer.json: expected at most"),
    "token of 10 MB": (long_token, "tokenizer.json: expected tokens of at most 4096 characters, found one of 10485760"),
    "template long": (write("chat_template.jinja", b"x" * (1 << 20)), "chat_template.jinja: expected at most 262144"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_refused(tmp_path: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    assert_refused(make_llama(tmp_path), message, damage)


def assert_refused(folder: Path, message: str, damage: Callable[[Path], None]) -> None:
    """It opens before the damage and not after, with one line that names the place."""
    open_checkpoint(folder)
    damage(folder)
    with pytest.raises(PowerinferError, match=message) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_unreadable_type(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    folder = make_llama(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float64)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(PowerinferError, match=r"model\.norm\.weight: expected type F32, F16, BF16, found F64"):
        open_checkpoint(folder)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(PowerinferError, match="expected a checkpoint folder or a GGUF file"):
        open_checkpoint(tmp_path / "none")
