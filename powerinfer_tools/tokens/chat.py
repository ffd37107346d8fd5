"""Conversations as token ids. What people say never becomes a control token; only the template gives those."""

import re
from collections.abc import Sequence
from typing import Any

from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.tokens.template import Message, render_chat
from powerinfer_tools.tokens.tokenizer import Tokenizer

PLAIN_STOPS = ("\nUser:",)
"""What ends an answer where there is no template: the model goes on with the other side's turn."""

_ROLE = re.compile(r"[a-z][a-z0-9_-]{0,31}")


def check_messages(messages: Any, where: str = "messages") -> list[Message]:
    """The messages, if each is {"role", "content"} with texts; else an error that names the place."""
    if not isinstance(messages, list) or not messages:
        raise PowerinferError(f"{where}: expected a list of messages, found {type(messages).__name__}", "usage")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise PowerinferError(f"{where}[{i}]: expected an object, found {type(message).__name__}", "usage")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not _ROLE.fullmatch(role):
            raise PowerinferError(f"{where}[{i}].role: expected a word like user, found {role!r:.40}", "usage")
        if not isinstance(content, str):
            found = type(content).__name__
            raise PowerinferError(f"{where}[{i}].content: expected a text, found {found}", "usage")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def chat_ids(
    tokenizer: Tokenizer, template: str | None, messages: Sequence[Message], add_generation_prompt: bool = True
) -> list[int]:
    """The conversation's ids, ready for the assistant's turn. template None: plain "User: … Assistant:" lines.

    Contents go into the template with a break inside whatever spells a control token, and the rendering is encoded
    with the breaks in force: so the template's own control tokens count, and no others.
    """
    if template is None:
        return tokenizer.encode(_plain(messages, add_generation_prompt), add_bos=True, parse_special=False)
    safe = [{"role": m["role"], "content": tokenizer.guarded(m["content"])} for m in messages]
    bos = tokenizer.text(tokenizer.bos)
    eos = tokenizer.text(tokenizer.eos[0] if tokenizer.eos else None)
    text = render_chat(template, safe, {"bos_token": bos, "eos_token": eos}, add_generation_prompt)
    return tokenizer.encode(tokenizer.settled(text), add_bos=False, parse_special=True)


def _plain(messages: Sequence[Message], add_generation_prompt: bool) -> str:
    names = {"user": "User: ", "assistant": "Assistant: "}
    lines = [names.get(m["role"], "") + m["content"].strip() for m in messages]
    return "\n".join(lines) + ("\nAssistant:" if add_generation_prompt else "")
