"""Texts to ids and back, whole and in streams."""

import json
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.tokens import Tokenizer
from tests.tokens.conftest import SPECIAL, byte_level_json, sentencepiece_json

TEXTS = ["", "hello world", " two  spaces ", "naïve 東京 🙂👩‍👩‍👧", "a\n\n\tb", "ￂ\x7f\u200b", "<0x41>"]
PIECES = st.sampled_from(["<s>", "</s>", "<|im_end|>", "<|im_", "start|>", "<", ">", "s", "/", "|", " ", "東", "hello"])
same_tokenizer = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_bos=True, parse_special=False)) == text


@same_tokenizer
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufdd0\u2581"), max_size=30))
def test_round_trip_of_any_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_bos=False, parse_special=False)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_decodes_as_the_library_does(text: str) -> None:
    from tokenizers import Tokenizer as Library

    for description in (byte_level_json(), sentencepiece_json()):
        library = Library.from_str(description)
        ids = library.encode(text, add_special_tokens=False).ids
        assert Tokenizer(description, SPECIAL).decode(ids) == library.decode(ids, skip_special_tokens=True)


def test_stream_never_cuts_a_character(tokenizer: Tokenizer) -> None:
    text = "é 東京 🙂 ñ👩‍👩‍👧 end"
    ids = tokenizer.encode(text, add_bos=True, parse_special=False)
    for cut in range(len(ids) + 1):
        stream, shown = tokenizer.stream(), ""
        for token in ids[:cut]:
            shown += stream.push(token)
            assert text.startswith(shown)
        whole = shown + "".join(map(stream.push, ids[cut:])) + stream.flush()
        assert whole == text


def test_stream_gives_every_split_of_bytes_once(sentencepiece: Tokenizer) -> None:
    text = "🙂é"
    ids = [3 + b for b in text.encode()]
    stream = sentencepiece.stream()
    assert [stream.push(i) for i in ids] == ["", "", "", "🙂", "", "é"]
    assert stream.flush() == ""


def test_an_unfinished_character_becomes_a_replacement_at_the_end(sentencepiece: Tokenizer) -> None:
    stream = sentencepiece.stream()
    assert stream.push(3 + 0xF0) == ""
    assert stream.flush() == "\ufffd"
    assert sentencepiece.decode([3 + 0xFF, 3 + ord("a")]) == "\ufffda"


def test_the_space_that_sentencepiece_puts_first_is_taken_off_once(sentencepiece: Tokenizer) -> None:
    ids = sentencepiece.encode("hello world", add_bos=True, parse_special=False)
    assert sentencepiece.decode(ids) == "hello world"
    follow = sentencepiece.encode("world", add_bos=False, parse_special=False)
    continuing = sentencepiece.stream(continuing=True)
    assert "".join(map(continuing.push, follow)) == " world"


@same_tokenizer
@given(ids=st.lists(st.one_of(st.integers(-3, 700), st.integers(-(2**63), 2**64)), max_size=20))
def test_decoding_is_total(tokenizer: Tokenizer, ids: list[int]) -> None:
    assert isinstance(tokenizer.decode(ids), str)


def test_every_id_decodes(tokenizer: Tokenizer) -> None:
    for token in range(-1, tokenizer.n_vocab + 5):
        assert isinstance(tokenizer.decode([token]), str)


def test_malformed_byte_tokens_are_text() -> None:
    description = json.loads(sentencepiece_json())
    for text in ("<0x-1>", "<0xZZ>", "<0x1>"):
        description["model"]["vocab"][text] = len(description["model"]["vocab"])
    tokenizer = Tokenizer(json.dumps(description), SPECIAL)
    n = len(description["model"]["vocab"])
    assert tokenizer.decode([n - 3, n - 2, n - 1]) == "<0x-1><0xZZ><0x1>"


@same_tokenizer
@given(parts=st.lists(PIECES, max_size=8))
def test_plain_text_never_becomes_a_control_token(tokenizer: Tokenizer, parts: list[str]) -> None:
    text = "".join(parts)
    ids = tokenizer.encode(text, add_bos=False, parse_special=False)
    assert tokenizer.control.isdisjoint(ids)
    assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")


def test_a_vocabulary_whose_pieces_spell_control_tokens() -> None:
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    vocab = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -2.0), *((c, -5.0) for c in "</s>abc")]
    library = Library(models.Unigram(vocab, unk_id=0))
    library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = Tokenizer(library.to_str(), {"bos": 1, "eos": [2], "add_bos": True})
    assert 2 in library.encode("a</s>b", add_special_tokens=False).ids
    assert 2 not in tokenizer.encode("a</s>b", add_bos=False, parse_special=False)


def test_parse_special_and_bos(byte_level: Tokenizer, sentencepiece: Tokenizer) -> None:
    assert byte_level.encode("<|im_start|>", add_bos=True, parse_special=True) == [2]
    assert sentencepiece.encode("hello", add_bos=True, parse_special=False)[0] == 1
    assert 1 not in sentencepiece.encode("hello", add_bos=False, parse_special=False)


def test_control_tokens_show_nothing(byte_level: Tokenizer) -> None:
    ids = [2, *byte_level.encode("hi", add_bos=False, parse_special=False), 3]
    assert byte_level.decode(ids) == "hi"


def test_truncation_of_the_description_is_ignored() -> None:
    description = json.loads(byte_level_json())
    description["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    tokenizer = Tokenizer(json.dumps(description), SPECIAL)
    assert len(tokenizer.encode("a long text, longer than two tokens", add_bos=False, parse_special=False)) > 2


def test_lone_surrogates_are_encoded(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\udcffb", add_bos=False, parse_special=False)) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode("a\ud800b", add_bos=False, parse_special=True)) == "a\ufffdb"


@pytest.mark.parametrize("text", ["", "{}", "nonsense", '{"model": {"type": "BPE", "vocab": 3}}'])
def test_no_tokenizer(text: str) -> None:
    with pytest.raises(PowerinferError, match=r"tokenizer\.json: expected a tokenizer"):
        Tokenizer(text, SPECIAL)


@pytest.mark.parametrize("make", [byte_level_json, sentencepiece_json])
@pytest.mark.parametrize("added", [False, True])
def test_a_token_of_10_mb_is_refused(make: Callable[[], str], added: bool) -> None:
    """The library makes an automaton of added tokens, of a gigabyte for this one."""
    text, description = "a" * (10 << 20), json.loads(make())
    if added:
        description["added_tokens"][0]["content"] = text
    else:
        description["model"]["vocab"][text] = 1000
    with pytest.raises(PowerinferError, match="expected tokens of at most 4096 characters, found one of 10485760"):
        Tokenizer(json.dumps(description), SPECIAL)


def test_a_token_of_the_longest_that_is_allowed() -> None:
    description = json.loads(byte_level_json())
    token = description["model"]["vocab"]["a" * 4096] = 1000
    assert Tokenizer(json.dumps(description), SPECIAL).decode([token]) == "a" * 4096


def test_an_unknown_decoder_is_refused_by_name() -> None:
    description = json.loads(byte_level_json())
    description["decoder"] = {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True}
    with pytest.raises(PowerinferError, match=r"decoder\.type: .* found CTC"):
        Tokenizer(json.dumps(description), SPECIAL)
