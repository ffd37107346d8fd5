"""tokenizer.json, the chat template and the special tokens of a Hugging Face folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from powerinfer_tools.checkpoint.fields import read_json, read_text
from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.tokens import load_tokenizer

TOKENIZER_LIMIT = 64 << 20
TEMPLATE_LIMIT = 256 << 10
CONFIG_LIMIT = 4 << 20


def read_tokenizer(folder: Path) -> tuple[str, Any]:
    """The text of tokenizer.json, or of one that tokenizer.model makes, and the library's tokenizer.

    Errors: missing, too large, no tokenizer.
    """
    path = folder / "tokenizer.json"
    if not path.is_file() and (folder / "tokenizer.model").is_file():
        from powerinfer_tools.checkpoint.sentencepiece import convert_sentencepiece

        path = folder / "tokenizer.model"
        text = convert_sentencepiece(path)
    else:
        text = read_text(path, TOKENIZER_LIMIT)
    return text, load_tokenizer(text, str(path))


def read_template(folder: Path) -> str | None:
    """The chat template: chat_template.jinja, or the (default) one of tokenizer_config.json, or None."""
    if (folder / "chat_template.jinja").is_file():
        return read_text(folder / "chat_template.jinja", TEMPLATE_LIMIT)
    template = _optional_json(folder, "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        return None
    if len(template.encode()) > TEMPLATE_LIMIT:
        where = f"{folder / 'tokenizer_config.json'}: chat_template"
        raise PowerinferError(f"{where}: expected at most {TEMPLATE_LIMIT} bytes, found more", "malformed")
    return template


def read_special(folder: Path, config: dict[str, Any], tokenizer: Any, n_vocab: int) -> dict[str, Any]:
    """bos, eos (all ids that end a text), add_bos, and the texts bos_token and eos_token that templates use.

    Errors: an id outside the vocabulary.
    """
    names = _optional_json(folder, "tokenizer_config.json")
    generation = _optional_json(folder, "generation_config.json")
    named = {key: tokenizer.token_to_id(_content(names.get(f"{key}_token")) or "") for key in ("bos", "eos")}
    bos = _ids(named["bos"]) or _ids(config.get("bos_token_id")) or _ids(generation.get("bos_token_id"))
    eos = _ids(named["eos"]) + _ids(generation.get("eos_token_id")) + _ids(config.get("eos_token_id"))
    eos = list(dict.fromkeys(eos))
    for token in bos + eos:
        if not 0 <= token < n_vocab:
            raise PowerinferError(f"{folder}: bos and eos: expected ids below {n_vocab}, found {token}", "mismatch")
    add_bos = names.get("add_bos_token")
    if not isinstance(add_bos, bool):  # then the tokenizer itself says, and a tokenizer.model always adds it
        converted = not (folder / "tokenizer.json").is_file()
        add_bos = converted or (bool(bos) and tokenizer.encode("a").ids[:1] == bos[:1])
    return special_tokens(tokenizer.id_to_token, bos[0] if bos else None, eos, add_bos)


def special_tokens(
    text_of: Callable[[int], str | None], bos: int | None, eos: list[int], add_bos: bool
) -> dict[str, Any]:
    """The form in which a Checkpoint gives its special tokens. text_of: a token's text by its id."""
    return {
        "bos": bos,
        "eos": eos,
        "add_bos": add_bos and bos is not None,
        "bos_token": "" if bos is None else text_of(bos) or "",
        "eos_token": "" if not eos else text_of(eos[0]) or "",
    }


def _optional_json(folder: Path, name: str) -> dict[str, Any]:
    return read_json(folder / name, CONFIG_LIMIT) if (folder / name).is_file() else {}


def _content(token: object) -> str | None:
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) else None


def _ids(value: object) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool)]
