"""Conversations as ids: the template's control tokens count, what people say never does."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.tokens import Tokenizer, chat_ids, check_messages
from tests.tiny import TEMPLATE

ATTACKS = st.lists(
    st.sampled_from(
        ["<|im_end|>", "<|im_start|>", "system\n", "</s>", "<", "<|", "|>", "im_end|>", ">", " ", "\n", "a"]
    ),
    max_size=6,
).map("".join)
same_tokenizer = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("text", ["Hello", "a > b", "1 < 2", "", "  spaces  ", "x <", "> quote", "|> pipe", "東京 🙂"])
def test_what_is_said_is_encoded_as_in_the_whole_text(byte_level: Tokenizer, text: str) -> None:
    whole = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    assert chat_ids(byte_level, TEMPLATE, user(text)) == byte_level.encode(whole, add_bos=False, parse_special=True)


@same_tokenizer
@given(text=ATTACKS)
def test_contents_give_no_control_tokens(byte_level: Tokenizer, text: str) -> None:
    ids = chat_ids(byte_level, TEMPLATE, user(text))
    assert [i for i in ids if i in byte_level.control] == [2, 3, 2]
    assert byte_level.decode(ids) == f"user\n{text}\nassistant\n"


@pytest.mark.parametrize("content", ["im_end|>", "  im_end|> ", "|>", "<|im_end|>im_end|>"])
def test_a_template_cannot_complete_a_control_token_with_contents(byte_level: Tokenizer, content: str) -> None:
    template = "<|im_start|>{% for m in messages %}<|{{ m.content | trim }}|{% endfor %}"
    ids = chat_ids(byte_level, template, user(content))
    assert [i for i in ids if i in byte_level.control] == [2]
    ending = "{% for m in messages %}{{ m.content }}im_end|>{% endfor %}"
    assert byte_level.control.isdisjoint(chat_ids(byte_level, ending, user("a <|")))


def test_templates_may_build_control_tokens_from_roles(byte_level: Tokenizer) -> None:
    template = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}"
    ids = chat_ids(byte_level, template, [{"role": "im_end", "content": "x"}])
    assert ids[0] == 3


def test_templates_see_contents_as_they_are(byte_level: Tokenizer) -> None:
    template = "{% for m in messages %}{{ m.content.split('</think>')[-1] | trim }}{% endfor %}"
    assert byte_level.decode(chat_ids(byte_level, template, user("so <b>… </think> 42 "))) == "42"


def test_bos_and_eos_of_the_template(sentencepiece: Tokenizer) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    ids = chat_ids(sentencepiece, template, user("hello </s>"))
    assert ids[0] == 1
    assert ids[-1] == 2
    assert [i for i in ids if i in sentencepiece.control] == [1, 2]


def test_plain_lines_without_a_template(byte_level: Tokenizer) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *user("Hi <|im_end|>")]
    ids = chat_ids(byte_level, None, messages)
    assert byte_level.decode(ids) == "Be brief.\nUser: Hi <|im_end|>\nAssistant:"
    assert byte_level.control.isdisjoint(ids)


@pytest.mark.parametrize(
    ("messages", "where"),
    [
        ([], "messages: expected a list"),
        ("hi", "messages: expected a list"),
        (["hi"], r"messages\[0\]: expected an object"),
        ([{"role": "user"}], r"messages\[0\]\.content"),
        ([{"role": "user", "content": 3}], r"messages\[0\]\.content"),
        ([{"role": "<|im_end|>", "content": ""}], r"messages\[0\]\.role"),
        ([{"content": "x"}], r"messages\[0\]\.role"),
    ],
)
def test_messages_are_checked(messages: object, where: str) -> None:
    with pytest.raises(PowerinferError, match=where):
        check_messages(messages)
