"""Calibration text to token windows."""

from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from powerinfer_tools.checkpoint.source import Checkpoint
from powerinfer_tools.errors import PowerinferError

BYTES_PER_TOKEN = 64  # text looked at per token wanted: enough to choose from, bounded for a corpus of any size
SPANS = 64  # a file beyond that is read in this many evenly spread spans


def calibration_windows(
    checkpoint: Checkpoint, corpus: list[Path], n_tokens: int, window: int
) -> npt.NDArray[np.int64]:
    """Token ids [n_windows, window], evenly spread over the corpus, at most `n_tokens` in all and no text twice.

    Each window begins with the model's BOS token where the model wants one. Errors: a file is missing or no UTF-8
    text; the corpus is shorter than one window.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(checkpoint.tokenizer_json)
    begin = [checkpoint.special["bos"]] if checkpoint.special.get("add_bos") else []
    step = window - len(begin)
    limit = BYTES_PER_TOKEN * n_tokens // len(corpus)
    pieces = []
    for path in corpus:
        ids = np.array(tokenizer.encode(_text(path, limit), add_special_tokens=False).ids, dtype=np.int64)
        pieces.append(ids[: len(ids) // step * step].reshape(-1, step))
    windows = np.concatenate(pieces)
    if len(windows) == 0:
        names = ", ".join(str(path) for path in corpus)
        raise PowerinferError(f"{names}: expected at least {step} tokens in one file, found fewer", "input")
    wanted = max(1, n_tokens // window)
    if len(windows) > wanted:
        windows = windows[np.arange(wanted) * len(windows) // wanted]
    return np.concatenate([np.tile(np.array(begin, dtype=np.int64), (len(windows), 1)), windows], axis=1)


def _text(path: Path, limit: int) -> str:
    """The file's text, or evenly spread spans of it, `limit` bytes in all."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if size <= limit:
                return file.read().decode()
            return "\n".join(_span(file, k * size // SPANS, limit // SPANS) for k in range(SPANS))
    except UnicodeDecodeError as error:
        raise PowerinferError(f"{path}: expected UTF-8 text, found {error.reason}", "input") from None
    except OSError as error:
        raise PowerinferError(f"{path}: expected a text file, found {error.strerror}", "usage") from None


def _span(file: BinaryIO, offset: int, n_bytes: int) -> str:
    file.seek(offset)
    span = file.read(n_bytes)
    text = span.decode(errors="ignore")
    if len(span) - len(text.encode()) > 6:  # more than a cut character at each end
        span.decode()
    return text
