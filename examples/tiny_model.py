"""Writes a tiny random llama checkpoint with ReLU: a Hugging Face folder of 0.3 MB, made without any network.

python examples/tiny_model.py FOLDER [--layers 3]

What it says is noise; it is for pipelines that check commands, exit codes and files.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

N_EMBD, N_FF, N_HEAD, N_HEAD_KV, N_CTX = 64, 256, 4, 2, 256
GATE_RANK = 8  # low, so that there is something to predict
END = "<|end|>"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--layers", type=int, default=3)
    arguments.add_argument("--seed", type=int, default=0)
    args = arguments.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    n_vocab = write_tokenizer(args.folder)
    (args.folder / "config.json").write_text(json.dumps(config(args.layers, n_vocab), indent=1))
    weights = random_weights(args.layers, n_vocab, np.random.default_rng(args.seed))
    save_file(weights, args.folder / "model.safetensors", {"format": "pt"})
    print(f"{args.folder}: {args.layers} layers, {sum(w.size for w in weights.values())} parameters")


def config(n_layer: int, n_vocab: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "relu",
        "mlp_bias": True,
        "hidden_size": N_EMBD,
        "intermediate_size": N_FF,
        "num_hidden_layers": n_layer,
        "num_attention_heads": N_HEAD,
        "num_key_value_heads": N_HEAD_KV,
        "max_position_embeddings": N_CTX,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": n_vocab,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
    }


def random_weights(n_layer: int, n_vocab: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    def matrix(n_out: int, n_in: int) -> np.ndarray:
        return (rng.standard_normal((n_out, n_in)) / n_in**0.5).astype(np.float32)

    head_dim = N_EMBD // N_HEAD
    weights = {"model.embed_tokens.weight": matrix(n_vocab, N_EMBD)}
    for i in range(n_layer):
        layer = f"model.layers.{i}"
        weights[f"{layer}.input_layernorm.weight"] = np.ones(N_EMBD, np.float32)
        weights[f"{layer}.self_attn.q_proj.weight"] = matrix(N_EMBD, N_EMBD)
        weights[f"{layer}.self_attn.k_proj.weight"] = matrix(N_HEAD_KV * head_dim, N_EMBD)
        weights[f"{layer}.self_attn.v_proj.weight"] = matrix(N_HEAD_KV * head_dim, N_EMBD)
        weights[f"{layer}.self_attn.o_proj.weight"] = matrix(N_EMBD, N_EMBD)
        weights[f"{layer}.post_attention_layernorm.weight"] = np.ones(N_EMBD, np.float32)
        weights[f"{layer}.mlp.gate_proj.weight"] = matrix(N_FF, GATE_RANK) @ matrix(GATE_RANK, N_EMBD)
        weights[f"{layer}.mlp.gate_proj.bias"] = np.full(N_FF, -1, np.float32)  # most gates stay shut
        weights[f"{layer}.mlp.up_proj.bias"] = np.zeros(N_FF, np.float32)
        weights[f"{layer}.mlp.down_proj.bias"] = np.zeros(N_EMBD, np.float32)
        weights[f"{layer}.mlp.up_proj.weight"] = matrix(N_FF, N_EMBD)
        weights[f"{layer}.mlp.down_proj.weight"] = matrix(N_EMBD, N_FF)
    weights["model.norm.weight"] = np.ones(N_EMBD, np.float32)
    return weights


def write_tokenizer(folder: Path) -> int:
    """A byte-level tokenizer: one token a byte and one that ends a text. Returns the number of tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    symbols = [END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    return len(symbols)


if __name__ == "__main__":
    main()
