"""tokenizer.json as the library of that name reads it, within bounds."""

import json
from typing import Any

from powerinfer_tools.errors import PowerinferError

MAX_TOKEN = 4096  # characters; of 10 MB among added_tokens the library makes an automaton of 1 GB, in seconds


def load_tokenizer(text: str, where: str) -> Any:
    """The library's tokenizer. Errors: not a tokenizer; a token that is too long."""
    from tokenizers import Tokenizer

    if (longest := _longest_token(text)) > MAX_TOKEN:
        expected = f"tokens of at most {MAX_TOKEN} characters"
        raise PowerinferError(f"{where}: expected {expected}, found one of {longest}", "malformed")
    try:
        return Tokenizer.from_str(text)
    except BaseException as error:  # a panic of the Rust library is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise PowerinferError(f"{where}: expected a tokenizer, found {error}", "malformed") from None


def _longest_token(text: str) -> int:
    """Characters of the longest token; 0 of what is no tokenizer: the library says why."""
    try:
        description = json.loads(text)
        vocab = description["model"]["vocab"]
        tokens = list(vocab) if isinstance(vocab, dict) else [token for token, _ in vocab]
        tokens += [added["content"] for added in description.get("added_tokens") or []]
        return max(map(len, tokens), default=0)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return 0
