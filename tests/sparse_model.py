"""A really sparse model for the tests: a small ReLU llama, trained from the shipped corpus in a minute or two.

`python tests/sparse_model.py FOLDER` trains it and prints what it is like. Beside the language loss an L1 pressure on
the activated gates, taken relative to each token's gate norm so that shrinking all gates does not ease it, is steered
until few neurons fire. The pressure differs from neuron to neuron, which spreads their firing frequencies.
"""

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

CORPUS = Path(__file__).parent.parent / "examples" / "corpus"
N_VOCAB, N_LAYER, N_EMBD, N_FF, N_HEAD, N_HEAD_KV = 2048, 4, 192, 1024, 6, 2
ACTIVE = 0.06  # the share of neurons that the pressure steers to
STEPS, BATCH, WINDOW = 900, 4, 128
END = "<|end|>"


def cached(cache: Path) -> Path:
    """The model's folder below `cache`, trained when it is not there; named after this script and the corpus."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in training_texts():
        digest.update(path.read_bytes())
    folder = cache / f"sparse-model-{digest.hexdigest()[:16]}"
    if not (folder / "config.json").is_file():
        partial = cache / f".{folder.name}.partial"
        train(partial)
        partial.rename(folder)
    return folder


def training_texts() -> list[Path]:
    return [CORPUS / name for name in ("sotu.txt", "factbook.txt", "jargon.txt")]


def train(folder: Path) -> dict[str, Any]:
    """Writes a Hugging Face folder; returns the last steps' figures."""
    from transformers import LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    tokens = torch.tensor(train_tokenizer(folder))
    torch.manual_seed(0)
    model = LlamaForCausalLM(config())
    gates = watch_gates(model)
    weights = pressure_weights()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, STEPS, pct_start=0.1)
    strength = torch.full([N_LAYER], 1e-3)
    for step in range(STEPS):
        starts = torch.randint(len(tokens) - WINDOW, (BATCH,))
        batch = torch.stack([tokens[s : s + WINDOW] for s in starts])
        gates.clear()
        loss = model(batch, labels=batch).loss
        active = torch.stack([(gate > 0).float().mean() for gate in gates])
        optimizer.zero_grad()
        (loss + strength @ torch.stack([pressure(g, w) for g, w in zip(gates, weights, strict=True)])).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        strength = (strength * torch.where(active > ACTIVE, 1.01, 1 / 1.01)).clamp(1e-3, 3e-2)
        if step % 100 == 99:
            print(f"step {step + 1}: loss {loss.item():.3f}, active {active.mean():.3f}", flush=True)
    model.save_pretrained(folder)
    return {"loss": loss.item(), "active": active.mean().item()}


def train_tokenizer(folder: Path) -> list[int]:
    """Writes tokenizer.json and tokenizer_config.json; returns the ids of the training texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=N_VOCAB,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(p) for p in training_texts()], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "bos_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    documents = [d for p in training_texts() for d in p.read_text(encoding="utf-8").split("\n\n\n")]
    return [i for d in documents for i in (*tokenizer.encode(d).ids, tokenizer.token_to_id(END))]


def config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=N_VOCAB,
        hidden_size=N_EMBD,
        intermediate_size=N_FF,
        num_hidden_layers=N_LAYER,
        num_attention_heads=N_HEAD,
        num_key_value_heads=N_HEAD_KV,
        max_position_embeddings=512,
        hidden_act="relu",
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )


def watch_gates(model: Any) -> list[torch.Tensor]:
    """A list that each forward pass fills with every layer's gates before the activation, [b, n, n_ff]."""
    gates: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.mlp.gate_proj.register_forward_hook(lambda module, inputs, gate: gates.append(gate))
    return gates


def pressure_weights() -> list[torch.Tensor]:
    """One weight a neuron, log-uniform over a factor of 100, mean 1, in an order of its own for each layer."""
    spread = torch.logspace(-1, 1, N_FF)
    return [(spread / spread.mean())[torch.randperm(N_FF)] for _ in range(N_LAYER)]


def pressure(gate: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    norm = gate.norm(dim=-1, keepdim=True).detach() + 1e-6
    return (torch.relu(gate) * weight / norm).sum(-1).mean()


if __name__ == "__main__":
    begin = time.monotonic()
    print(train(Path(sys.argv[1])), f"{time.monotonic() - begin:.0f} s")
