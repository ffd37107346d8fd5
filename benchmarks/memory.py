"""Peak memory of profile, train and split on a synthetic checkpoint of 3 GB; exits with 1 where one reaches 2 GB.

    python benchmarks/memory.py [FOLDER]

FOLDER (a temporary one by default) needs 6 GB. The checkpoint has the width of a 7B llama (n_embd 4096, n_ff 11008) and
a large vocabulary, but 2 layers: memory does not depend on their number, and training at this width takes minutes a
layer. ReLU and random float16 weights, a shard a layer. What a process maps of a file counts as its memory.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.tiny import CORPUS, make_tokenizer

LIMIT = 2 * 10**9  # bytes
N_LAYER, N_EMBD, N_FF, N_HEAD, N_VOCAB = 2, 4096, 11008, 32, 131072
BLOCK = 1 << 24  # weights drawn at a time

Shapes = dict[str, tuple[int, ...]]


def main(folder: Path) -> int:
    """Runs the stages and prints a line for each; returns the exit code."""
    model, text = folder / "model", folder / "text.txt"
    n_bytes = write_checkpoint(model)
    text.write_text(CORPUS * 300)
    print(f"checkpoint: {n_bytes / 1e9:.2f} GB of float16, {N_LAYER} layers, n_embd {N_EMBD}, n_ff {N_FF}")
    activations, predictors, artifact = (folder / f"m.{suffix}" for suffix in ("activations", "predictors", "gguf"))
    peaks = [
        run("profile", model, "--corpus", text, "-o", activations, "--tokens", "8192"),
        run("train", model, "--activations", activations, "-o", predictors),
        run("split", model, "--activations", activations, "--predictors", predictors, "-o", artifact),
    ]
    return int(max(peaks) >= LIMIT)


def run(command: str, *arguments: object) -> int:
    """Runs one command to its end and prints what it took; returns its peak memory in bytes."""
    words = [sys.executable, "-m", "powerinfer_tools.cli.main", command, *map(str, arguments)]
    started = time.monotonic()
    _, status, usage = os.wait4(os.posix_spawn(sys.executable, words, os.environ), 0)
    if status:
        raise SystemExit(f"powerinfer {command} failed with {os.waitstatus_to_exitcode(status)}")
    peak = usage.ru_maxrss << 10
    print(
        f"{command:8} peak {peak / 1e9:.2f} GB of {LIMIT / 1e9:.0f}, {time.monotonic() - started:.0f} s",
        flush=True,
    )
    return peak


def write_checkpoint(folder: Path) -> int:
    """Writes the model, a shard a layer and one for the rest; returns the bytes of its weights."""
    folder.mkdir(parents=True)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "relu",
        "hidden_size": N_EMBD,
        "intermediate_size": N_FF,
        "num_hidden_layers": N_LAYER,
        "num_attention_heads": N_HEAD,
        "num_key_value_heads": N_HEAD,
        "vocab_size": N_VOCAB,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(make_tokenizer(300))
    shards = [layer_shapes(i) for i in range(N_LAYER)]
    ends = {"model.embed_tokens.weight": (N_VOCAB, N_EMBD), "lm_head.weight": (N_VOCAB, N_EMBD)}
    shards.append({**ends, "model.norm.weight": (N_EMBD,)})
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    rng = np.random.default_rng(0)
    n_bytes = sum(write_shard(folder / name, shapes, rng) for name, shapes in zip(names, shards, strict=True))
    weight_map = {tensor: name for name, shapes in zip(names, shards, strict=True) for tensor in shapes}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return n_bytes


def layer_shapes(i: int) -> Shapes:
    """The tensors of one layer."""
    attention = {f"self_attn.{part}_proj": (N_EMBD, N_EMBD) for part in "qkvo"}
    ffn = {"mlp.gate_proj": (N_FF, N_EMBD), "mlp.up_proj": (N_FF, N_EMBD), "mlp.down_proj": (N_EMBD, N_FF)}
    norms = {"input_layernorm": (N_EMBD,), "post_attention_layernorm": (N_EMBD,)}
    return {f"model.layers.{i}.{name}.weight": shape for name, shape in (attention | ffn | norms).items()}


def write_shard(path: Path, shapes: Shapes, rng: np.random.Generator) -> int:
    """Streams random weights into a safetensors file; returns their bytes."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            n = int(np.prod(shape))
            for start in range(0, n, BLOCK):
                drawn = rng.standard_normal(min(BLOCK, n - start), np.float32) * np.float32(shape[-1] ** -0.5)
                file.write(drawn.astype(np.float16).data)
    return offset


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.gettempdir())
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        sys.exit(main(Path(name)))
