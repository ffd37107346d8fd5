"""The default model, where it is installed: a real GGUF file, its tokenizer and its answer."""

import pytest
import torch
from tokenizers import Tokenizer

from powerinfer_tools.checkpoint import Checkpoint, open_checkpoint
from powerinfer_tools.default_model import default_checkpoint
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.reference import forward

CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    try:
        return open_checkpoint(default_checkpoint())
    except PowerinferError as error:
        pytest.skip(f"{error}")


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
