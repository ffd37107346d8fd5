"""A tokenizer.json rebuilt from the tokenizer.ggml.* keys of a GGUF file: byte-level BPE, and SentencePiece BPE."""

import json
import re
from typing import Any

from powerinfer_tools.checkpoint.fields import Fields
from powerinfer_tools.checkpoint.huggingface_tokenizer import special_tokens
from powerinfer_tools.tokens.library import MAX_TOKEN, load_tokenizer

Json = dict[str, Any]

PREFIX = "tokenizer.ggml."
NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6  # token types
SPACE = "\u2581"  # how SentencePiece writes a space

GPT2 = "gpt-2"
PATTERNS = {
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
PRE_TOKENIZERS = (GPT2, "smollm", "falcon", *PATTERNS)


def rebuild_tokenizer(fields: Fields) -> str:
    """The text of a tokenizer.json that cuts text into the same tokens.

    Errors: an unknown kind or pre-tokenizer, named with those that are known; a vocabulary that breaks its rules.
    """
    kind = fields.text(f"{PREFIX}model")
    if kind not in ("gpt2", "llama"):
        raise fields.unsupported(f"{PREFIX}model", "gpt2 or llama")
    tokens = _tokens(fields)
    types = _types(fields, len(tokens))
    tokenizer = _byte_level(fields, tokens) if kind == "gpt2" else _sentencepiece(fields, tokens, types)
    tokenizer |= {"version": "1.0", "truncation": None, "padding": None, "post_processor": None}
    tokenizer["added_tokens"] = [
        _added(i, token, types[i] == CONTROL) for i, token in enumerate(tokens) if types[i] in (CONTROL, USER_DEFINED)
    ]
    text = json.dumps(tokenizer, ensure_ascii=False)
    load_tokenizer(text, f"{fields.where}: {PREFIX}tokens")
    return text


def read_special(fields: Fields) -> Json:
    """bos, eos, add_bos and their texts, as every Checkpoint gives them. Errors: an id outside the vocabulary."""
    tokens = _tokens(fields)
    last = len(tokens) - 1

    def ids(*names: str) -> list[int]:
        keys = [f"{PREFIX}{name}_token_id" for name in names]
        return [fields.integer(key, low=0, high=last) for key in keys if key in fields]

    adds = fields.text(f"{PREFIX}model") == "llama" or fields.text(f"{PREFIX}pre", "") == "llama-bpe"
    add_bos = fields.flag(f"{PREFIX}add_bos_token", adds)
    bos = ids("bos")
    eos = list(dict.fromkeys(ids("eos", "eot", "eom")))
    return special_tokens(tokens.__getitem__, bos[0] if bos else None, eos, add_bos)


def _tokens(fields: Fields) -> list[str]:
    key = f"{PREFIX}tokens"
    tokens = fields.values.get(key)
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise fields.error(key, "a list of strings", tokens)
    if len(set(tokens)) != len(tokens):
        raise fields.error(key, "every token once", f"{len(tokens) - len(set(tokens))} repeated", "malformed")
    if (longest := max(map(len, tokens))) > MAX_TOKEN:
        raise fields.error(key, f"tokens of at most {MAX_TOKEN} characters", longest, "malformed")
    return tokens


def _types(fields: Fields, n: int) -> list[int]:
    key = f"{PREFIX}token_type"
    types = fields.values.get(key, [NORMAL] * n)
    if not isinstance(types, list) or len(types) != n or not all(isinstance(t, int) for t in types):
        raise fields.error(key, f"{n} integers", types)
    return types


def _added(i: int, token: str, special: bool) -> Json:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": token, "special": special, **plain}


def _bpe(tokens: list[str], merges: list[tuple[str, str]], **options: Any) -> Json:
    vocab = {token: i for i, token in enumerate(tokens)}
    return {"type": "BPE", "vocab": vocab, "merges": merges, "dropout": None, **options}


def _byte_level(fields: Fields, tokens: list[str]) -> Json:
    pre = fields.choice(f"{PREFIX}pre", PRE_TOKENIZERS)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps: list[Json] = [{**byte_level, "use_regex": pre not in PATTERNS}]
    if pre == "smollm":
        steps.insert(0, {"type": "Digits", "individual_digits": True})
    if pre == "falcon":
        punctuation: Json = {"type": "Punctuation", "behavior": "Contiguous"}
        steps = [punctuation, *steps, {"type": "Digits", "individual_digits": False}, _split("[0-9][0-9][0-9]")]
    if pre in PATTERNS:
        steps.insert(0, _split(PATTERNS[pre]))
    return {
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": {**byte_level, "use_regex": True},
        "model": _bpe(tokens, _merges(fields), ignore_merges=pre == "llama-bpe"),
    }


def _split(pattern: str) -> Json:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _merges(fields: Fields) -> list[tuple[str, str]]:
    key = f"{PREFIX}merges"
    merges = fields.values.get(key)
    if not isinstance(merges, list):
        raise fields.error(key, "a list of strings", merges)
    pairs = [str(merge).split(" ") for merge in merges]
    for merge, pair in zip(merges, pairs, strict=True):
        if len(pair) != 2:
            raise fields.error(key, "two pieces with a space between", merge, "malformed")
    return [(left, right) for left, right in pairs]


def _sentencepiece(fields: Fields, tokens: list[str], types: list[int]) -> Json:
    for token, kind in zip(tokens, types, strict=True):
        if kind == BYTE and not re.fullmatch("<0x[0-9A-F]{2}>", token):
            raise fields.error(f"{PREFIX}tokens", "byte tokens <0x00> .. <0xFF>", token, "malformed")
    unknown = fields.integer(f"{PREFIX}unknown_token_id", 0, low=0, high=len(tokens) - 1)
    prefixed = fields.flag(f"{PREFIX}add_space_prefix", True)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    steps: list[Json] = [{"type": "Prepend", "prepend": SPACE}, replace] if prefixed else [replace]
    back: list[Json] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefixed:
        back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    merges = _merges_by_score(tokens, types, _scores(fields, len(tokens)))
    options = {"unk_token": tokens[unknown], "fuse_unk": True, "byte_fallback": True}
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": back},
        "model": _bpe(tokens, merges, **options),
    }


def _scores(fields: Fields, n: int) -> list[float]:
    key = f"{PREFIX}scores"
    scores = fields.values.get(key)
    if not isinstance(scores, list) or len(scores) != n or not all(isinstance(s, (int, float)) for s in scores):
        raise fields.error(key, f"{n} numbers", scores)
    return scores


def _merges_by_score(tokens: list[str], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose joint has the best score (Kudo and Richardson 2018): as merges, every
    cut of every token into two tokens, best score first."""
    known = {token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    ranked = sorted((-scores[i], i) for i, token in enumerate(tokens) if token in known)
    cuts = ((tokens[i][:n], tokens[i][n:]) for _, i in ranked for n in range(1, len(tokens[i])))
    return [(left, right) for left, right in cuts if left in known and right in known]
