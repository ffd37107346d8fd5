"""Tokenizers rebuilt from GGUF cut text as the originals do."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from powerinfer_tools.checkpoint.fields import Fields
from powerinfer_tools.checkpoint.gguf_tokenizer import read_special, rebuild_tokenizer
from powerinfer_tools.errors import PowerinferError
from tests.tiny import CORPUS, SPECIALS
from tests.tiny_gguf import tokenizer_keys

TEXTS = [
    "",
    " ",
    "Hello, world!",
    " two  spaces   three\t\ttabs\r\n\r\nlines\n\n\n",
    "I'll we've THEY'RE it's Don'T",
    "1 12 123 1234 12345.678 0x1F 2024-11-23 ½ ٣",
    "naïve café Ångström e\u0301 \u212b",
    "東京は日本の首都です。 🙂👩‍👩‍👧 🏳️‍🌈",
    "<|im_start|>user\nhi<|im_end|>\n</s><s>x",
    "def f(x):\n    return x ** 2  # comment\n\n",
    CORPUS,
]
words = st.text(st.sampled_from("aeT hn's\n\t 129.,é京🙂_<|>"), max_size=40)


def byte_level(pre: str) -> Tokenizer:
    """Tokenizers as the models that name these pre-tokenizers publish them, with a small vocabulary."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in ("gpt-2", "smollm", "falcon"))
    contractions = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    rest = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    steps: dict[str, list[Any]] = {
        "gpt-2": [],
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "falcon": [pre_tokenizers.Punctuation("contiguous")],
        "llama-bpe": [
            pre_tokenizers.Split(Regex(contractions + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + rest), "isolated")
        ],
        "qwen2": [pre_tokenizers.Split(Regex(contractions + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + rest), "isolated")],
    }
    threes = pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated")
    after = [pre_tokenizers.Digits(individual_digits=False), threes] if pre == "falcon" else []
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps[pre], byte_level, *after])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS, *TEXTS], trainer)
    return tokenizer


def rebuilt(original: Tokenizer, pre: str) -> Tokenizer:
    keys = tokenizer_keys(json.loads(original.to_str()), pre)
    return Tokenizer.from_str(rebuild_tokenizer(Fields("m.gguf", keys)))


def assert_same(ours: Tokenizer, theirs: Tokenizer, text: str) -> None:
    ids = theirs.encode(text, add_special_tokens=False).ids
    assert ours.encode(text, add_special_tokens=False).ids == ids
    for skip in (True, False):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "falcon", "llama-bpe", "qwen2"])
def test_byte_level(pre: str) -> None:
    original = byte_level(pre)
    ours = rebuilt(original, pre)
    for text in TEXTS:
        assert_same(ours, original, text)

    @settings(max_examples=150, deadline=None)
    @given(words)
    def any_text(text: str) -> None:
        assert_same(ours, original, text)

    any_text()


def test_pre_tokenizers_differ() -> None:
    """Else the test above could not tell them apart."""
    original = byte_level("gpt-2")
    cuts = {
        pre: [rebuilt(original, pre).encode(t, add_special_tokens=False).tokens for t in TEXTS]
        for pre in ("gpt-2", "smollm", "falcon", "llama-bpe", "qwen2")
    }
    assert all(cuts[a] != cuts[b] for a in cuts for b in cuts if a < b)


PIECES = [
    "▁the",
    "▁t",
    "he",
    "▁th",
    "in",
    "▁in",
    "er",
    "▁▁",
    "▁a",
    "an",
    "th",
    "ing",
    "▁fox",
    "fo",
    "▁f",
    "ox",
    "ab",
    "bc",
]
LETTERS = sorted(set("▁ theinragfoxbc.,!0123456789'é") - {" "})


def sentencepiece_keys(prefixed: bool = True) -> dict[str, Any]:
    """A SentencePiece vocabulary as llama.cpp stores it: specials, bytes, pieces by falling score, letters."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *PIECES, *LETTERS, "<tool>"]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(PIECES) + len(LETTERS)), 4]
    scores = [0.0] * 259 + [-float(i) for i in range(len(PIECES))] + [-1e4 - i for i in range(len(LETTERS))] + [0.0]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_space_prefix": prefixed,
    }


def sentencepiece(keys: dict[str, Any], text: str) -> list[int]:
    """SentencePiece's BPE by its definition: join the best-scored neighbours, leftmost first, until none join."""
    tokens, types, scores = (keys[f"tokenizer.ggml.{k}"] for k in ("tokens", "token_type", "scores"))
    score = {t: s for t, s, kind in zip(tokens, scores, types, strict=True) if kind == 1}
    pieces = list(("▁" if keys["tokenizer.ggml.add_space_prefix"] and text else "") + text.replace(" ", "▁"))
    while joints := [(-score[a + b], i) for i, (a, b) in enumerate(pairwise(pieces)) if a + b in score]:
        i = min(joints)[1]
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    ids = [[tokens.index(p)] if p in score else [tokens.index(f"<0x{b:02X}>") for b in p.encode()] for p in pieces]
    return [i for part in ids for i in part]


@pytest.mark.parametrize("prefixed", [True, False])
def test_sentencepiece(prefixed: bool) -> None:
    keys = sentencepiece_keys(prefixed)
    ours = Tokenizer.from_str(rebuild_tokenizer(Fields("m.gguf", keys)))

    @settings(max_examples=300, deadline=None)
    @given(st.text(st.sampled_from("theinrag foxbcZ京\n.0"), max_size=30))
    def any_text(text: str) -> None:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == sentencepiece(keys, text)
        assert ours.decode(ids) == text

    any_text()
    assert ours.encode("the fox in the thing", add_special_tokens=False).ids == sentencepiece(
        keys, "the fox in the thing"
    )


def test_sentencepiece_specials_stay_whole() -> None:
    keys = sentencepiece_keys()
    ours = Tokenizer.from_str(rebuild_tokenizer(Fields("m.gguf", keys)))
    ids = ours.encode("<s>the<tool>fox</s>", add_special_tokens=False).ids
    tokens = keys["tokenizer.ggml.tokens"]
    assert [i for i in ids if i in (1, 2, len(tokens) - 1)] == [1, len(tokens) - 1, 2]
    assert "<tool>" in ours.decode(ids)
    assert "</s>" not in ours.decode(ids)


def test_special() -> None:
    fields = Fields("m.gguf", sentencepiece_keys())
    assert read_special(fields) == {
        "bos": 1,
        "eos": [2],
        "add_bos": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
    }


@pytest.mark.parametrize("bad", ["<0x-1>", "<0xZZ>", "<0x100>", "byte"])
def test_byte_tokens_are_checked(bad: str) -> None:
    keys = sentencepiece_keys()
    keys["tokenizer.ggml.tokens"][3] = bad
    with pytest.raises(PowerinferError, match="expected byte tokens <0x00>"):
        rebuild_tokenizer(Fields("m.gguf", keys))


def test_no_scores() -> None:
    keys = sentencepiece_keys()
    del keys["tokenizer.ggml.scores"]
    with pytest.raises(PowerinferError, match=r"scores: expected \d+ numbers, found nothing"):
        rebuild_tokenizer(Fields("m.gguf", keys))
