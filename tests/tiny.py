"""Small random checkpoints as Hugging Face folders, written in milliseconds without torch.

That transformers loads them and computes the same is tested in tests/reference.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

CORPUS = (
    "The quick brown fox jumps over the lazy dog. A neuron fires when its gate is above zero; few neurons "
    "fire for a token, and mostly the same ones. In 1789 there were 12 layers, 3.5 heads and "
    "100 % of the budget. "
    "Größe, naïve café, дом, 東京, 🙂 — they're what we've got, isn't it?\n\n\tThe end of the theory.\n"
)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")

Tensors = dict[str, np.ndarray]


def make_llama(
    folder: Path,
    *,
    n_layer: int = 2,
    n_embd: int = 64,
    n_ff: int = 160,
    n_head: int = 4,
    n_head_kv: int = 2,
    head_dim: int | None = None,
    n_vocab: int = 300,
    activation: str = "relu",
    tied: bool = False,
    bias: bool = False,
    rope_scaling: dict[str, Any] | None = None,
    n_ctx: int = 256,
    seed: int = 0,
    shards: int = 1,
    dtype: str = "F32",
    model_type: str = "llama",
) -> Path:
    """A llama-family folder: RMSNorm, RoPE, grouped heads, gated FFN. Returns `folder`.

    bias: on q, k, v, o and the FFN (model_type qwen2: always on q, k, v alone). fatrelu: threshold 0.05.
    """
    head_dim = head_dim or n_embd // n_head
    qkv_bias = bias or model_type == "qwen2"
    ffn_bias = bias and model_type == "llama"
    draw = _Draw(seed)
    tensors: Tensors = {"model.embed_tokens.weight": draw.matrix(n_vocab, n_embd, std=1.0)}
    for i in range(n_layer):
        layer = f"model.layers.{i}"
        tensors[f"{layer}.input_layernorm.weight"] = draw.norm(n_embd)
        tensors[f"{layer}.post_attention_layernorm.weight"] = draw.norm(n_embd)
        for part, n in (("q", n_head * head_dim), ("k", n_head_kv * head_dim), ("v", n_head_kv * head_dim)):
            draw.linear(tensors, f"{layer}.self_attn.{part}_proj", n, n_embd, qkv_bias)
        draw.linear(tensors, f"{layer}.self_attn.o_proj", n_embd, n_head * head_dim, ffn_bias)
        draw.linear(tensors, f"{layer}.mlp.gate_proj", n_ff, n_embd, ffn_bias)
        draw.linear(tensors, f"{layer}.mlp.up_proj", n_ff, n_embd, ffn_bias)
        draw.linear(tensors, f"{layer}.mlp.down_proj", n_embd, n_ff, ffn_bias)
    tensors["model.norm.weight"] = draw.norm(n_embd)
    if not tied:
        tensors["lm_head.weight"] = draw.matrix(n_vocab, n_embd)
    config = {
        "architectures": [{"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}[model_type] + "ForCausalLM"],
        "model_type": model_type,
        "hidden_size": n_embd,
        "intermediate_size": n_ff,
        "num_hidden_layers": n_layer,
        "num_attention_heads": n_head,
        "num_key_value_heads": n_head_kv,
        "head_dim": head_dim,
        "vocab_size": n_vocab,
        "max_position_embeddings": n_ctx,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": rope_scaling,
        "hidden_act": activation,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    if model_type == "llama":
        config |= {"attention_bias": bias, "mlp_bias": bias}
    if model_type == "mistral":
        config["sliding_window"] = None
    if activation == "fatrelu":
        config["hidden_act_param"] = 0.05
    return _write(folder, config, tensors, n_vocab, shards, dtype)


def make_opt(
    folder: Path,
    *,
    n_layer: int = 2,
    n_embd: int = 64,
    n_ff: int = 160,
    n_head: int = 4,
    n_vocab: int = 300,
    activation: str = "relu",
    tied: bool = True,
    bias: bool = True,
    n_ctx: int = 256,
    seed: int = 0,
    shards: int = 1,
    dtype: str = "F32",
) -> Path:
    """An opt-family folder: LayerNorm, learned positions, plain FFN. Returns `folder`."""
    draw = _Draw(seed)
    root = "model.decoder"
    tensors: Tensors = {
        f"{root}.embed_tokens.weight": draw.matrix(n_vocab, n_embd, std=1.0),
        f"{root}.embed_positions.weight": draw.matrix(n_ctx + 2, n_embd, std=0.5),
    }
    for i in range(n_layer):
        layer = f"{root}.layers.{i}"
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            tensors[f"{layer}.{norm}.weight"] = draw.norm(n_embd)
            tensors[f"{layer}.{norm}.bias"] = draw.bias(n_embd)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            draw.linear(tensors, f"{layer}.self_attn.{part}", n_embd, n_embd, bias)
        draw.linear(tensors, f"{layer}.fc1", n_ff, n_embd, bias)
        draw.linear(tensors, f"{layer}.fc2", n_embd, n_ff, bias)
    tensors[f"{root}.final_layer_norm.weight"] = draw.norm(n_embd)
    tensors[f"{root}.final_layer_norm.bias"] = draw.bias(n_embd)
    if not tied:
        tensors["lm_head.weight"] = draw.matrix(n_vocab, n_embd)
    config = {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "hidden_size": n_embd,
        "word_embed_proj_dim": n_embd,
        "ffn_dim": n_ff,
        "num_hidden_layers": n_layer,
        "num_attention_heads": n_head,
        "vocab_size": n_vocab,
        "max_position_embeddings": n_ctx,
        "do_layer_norm_before": True,
        "enable_bias": bias,
        "activation_function": activation,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    return _write(folder, config, tensors, n_vocab, shards, dtype)


def make_tokenizer(n_vocab: int, text: str = CORPUS) -> str:
    """The tokenizer.json of a byte-level BPE of at most n_vocab tokens (at least 260: bytes and SPECIALS)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return str(tokenizer.to_str())


class _Draw:
    """Random tensors; one stream, so that a seed names a model."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def matrix(self, n_out: int, n_in: int, std: float | None = None) -> np.ndarray:
        std = std or n_in**-0.5
        return (std * self._rng.standard_normal((n_out, n_in))).astype(np.float32)

    def norm(self, n: int) -> np.ndarray:
        return (1 + 0.1 * self._rng.standard_normal(n)).astype(np.float32)

    def bias(self, n: int) -> np.ndarray:
        return (0.1 * self._rng.standard_normal(n)).astype(np.float32)

    def linear(self, tensors: Tensors, name: str, n_out: int, n_in: int, bias: bool) -> None:
        tensors[f"{name}.weight"] = self.matrix(n_out, n_in)
        if bias:
            tensors[f"{name}.bias"] = self.bias(n_out)


def _write(folder: Path, config: dict[str, Any], tensors: Tensors, n_vocab: int, shards: int, dtype: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "tokenizer.json").write_text(make_tokenizer(n_vocab))
    text = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(text))
    write_safetensors(folder, tensors, shards, dtype)
    return folder


def write_safetensors(folder: Path, tensors: Tensors, shards: int = 1, dtype: str = "F32") -> None:
    """One file, or several with their index. dtype: F32, F16 or BF16 (truncated)."""
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        part = names[shard::shards]
        name = "model.safetensors" if shards == 1 else f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        weight_map |= dict.fromkeys(part, name)
        _write_shard(folder / name, {n: tensors[n] for n in part}, dtype)
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_shard(path: Path, tensors: Tensors, dtype: str) -> None:
    """safetensors by its definition (numpy has no bfloat16): header length, JSON, tensors end to end."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data, offset = [], 0
    for name, array in tensors.items():
        raw = _raw(array, dtype)
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [offset, offset + len(raw)],
        }
        data.append(raw)
        offset += len(raw)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data))


def _raw(array: np.ndarray, dtype: str) -> bytes:
    if dtype == "BF16":
        return (np.ascontiguousarray(array).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return array.astype({"F32": np.float32, "F16": np.float16}[dtype]).tobytes()
