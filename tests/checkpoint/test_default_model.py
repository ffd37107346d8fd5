"""The default model: a real GGUF file, its tokenizer and its answer; and what the patch makes of it."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from powerinfer_tools.checkpoint import Checkpoint, open_checkpoint
from powerinfer_tools.default_model import default_base, default_patch
from powerinfer_tools.progress import silent
from powerinfer_tools.reference import forward
from powerinfer_tools.sparsify.documents import cut_windows
from powerinfer_tools.sparsify.evaluation import evaluate

HELDOUT = Path(__file__).parent.parent.parent / "examples/corpus/heldout.txt"
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint(default_base())


@pytest.fixture(scope="module")
def sparse() -> Checkpoint:
    return open_checkpoint(default_base(), patch=default_patch())


def test_what_it_is(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    assert (config.n_layer, config.n_embd, config.n_ff, config.n_head, config.n_head_kv) == (30, 576, 1536, 9, 3)
    assert (config.activation, config.tied, config.n_vocab, config.n_ctx) == ("silu", True, 49152, 8192)
    assert checkpoint.special["eos_token"] == "<|im_end|>"
    assert checkpoint.special["add_bos"] is False
    assert checkpoint.metadata["license"] == "apache-2.0"
    assert "<|im_start|>" in (checkpoint.chat_template or "")


def test_tokenizer(checkpoint: Checkpoint) -> None:
    """Ids as the published tokenizer gives them; digits one by one, specials whole."""
    tokenizer = Tokenizer.from_str(checkpoint.tokenizer_json)
    assert tokenizer.encode("Hello, world!").ids == [19556, 28, 905, 17]
    assert tokenizer.encode("12 345").tokens == ["1", "2", "Ġ", "3", "4", "5"]
    assert tokenizer.encode("<|im_start|>user\n").ids == [1, 4093, 198]
    assert tokenizer.decode(tokenizer.encode("Größe 京 🙂\n").ids) == "Größe 京 🙂\n"


@pytest.mark.slow
def test_greedy_answer(checkpoint: Checkpoint) -> None:
    """Every token of the answer is the likeliest after those before it."""
    tokenizer = Tokenizer.from_str(checkpoint.tokenizer_json)
    prompt = tokenizer.encode(CHAT.format("What is the capital of France?")).ids
    answer = tokenizer.encode("The capital of France is Paris.<|im_end|>").ids
    logits = forward(checkpoint, torch.tensor([prompt + answer]))[0]
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer


def test_the_patch_cuts_every_layer(checkpoint: Checkpoint, sparse: Checkpoint) -> None:
    assert sparse.config.activation == "silu"
    assert len(sparse.config.thresholds) == 30
    assert all(0.001 < t < 1 for t in sparse.config.thresholds)
    assert sparse.inputs["base"] == checkpoint.digest()
    for kept in ("token_embd.weight", "blk.7.attn_q.weight"):
        assert (sparse.read(kept, slice(0, 8)) == checkpoint.read(kept, slice(0, 8))).all()


@pytest.mark.slow
def test_what_the_patch_costs_and_skips(checkpoint: Checkpoint, sparse: Checkpoint) -> None:
    """On a thousand tokens of held-out text; examples/default-model/README.md has the figures of all of it."""
    ids = Tokenizer.from_str(checkpoint.tokenizer_json).encode(HELDOUT.read_text(encoding="utf-8")).ids
    windows = {"text": cut_windows([ids], 256)[::14][:4]}
    dense, cut = (evaluate(model, windows, "cpu", silent, "") for model in (checkpoint, sparse))
    assert min(dense.active) > 0.999
    assert sum(cut.active) / 30 < 0.4
    assert cut.perplexity["text"] < 1.25 * dense.perplexity["text"]


@pytest.mark.slow
def test_the_sparse_model_knows_the_capital(sparse: Checkpoint) -> None:
    tokenizer = Tokenizer.from_str(sparse.tokenizer_json)
    ids = tokenizer.encode(CHAT.format("What is the capital of France?") + "The capital of France is").ids
    assert tokenizer.decode([int(forward(sparse, torch.tensor([ids]))[0, -1].argmax())]) == " Paris"
