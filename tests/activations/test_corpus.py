"""Calibration windows: no text twice, evenly spread, clear errors."""

import pytest

from powerinfer_tools.activations.corpus import calibration_windows
from powerinfer_tools.checkpoint import open_checkpoint
from powerinfer_tools.errors import PowerinferError
from tests import planted, tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return open_checkpoint(tiny.make_llama(tmp_path_factory.mktemp("model")))


def test_windows_begin_with_bos_and_spread_over_all_files(tmp_path, checkpoint):
    files = [planted.write_text(tmp_path / f"{k}.txt", seed=k, n_words=1500) for k in range(2)]
    every = calibration_windows(checkpoint, files, 10**6, 32)
    some = calibration_windows(checkpoint, files, 320, 32)
    bos = [checkpoint.special["bos"]] if checkpoint.special.get("add_bos") else []
    assert some.shape == (10, 32)
    assert (some[:, : len(bos)] == bos).all()
    rows = [next(k for k, row in enumerate(every) if (row == window).all()) for window in some]
    assert rows == [k * len(every) // 10 for k in range(10)]


def test_a_long_file_is_read_in_spans_from_end_to_end(tmp_path, checkpoint):
    path = tmp_path / "long.txt"
    path.write_text("é" * 50_000 + "z" * 50_000)
    windows = calibration_windows(checkpoint, [path], 320, 32)
    z = checkpoint_id(checkpoint, "z")
    share = (windows == z).mean()
    assert 0.2 < share < 0.6


def checkpoint_id(checkpoint, text: str) -> int:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(checkpoint.tokenizer_json).encode(text, add_special_tokens=False).ids[0]


def test_a_small_corpus_is_used_whole(tmp_path, checkpoint):
    windows = calibration_windows(checkpoint, [planted.write_text(tmp_path / "t", n_words=100)], 10**6, 32)
    assert 3 <= len(windows) < 100


@pytest.mark.parametrize(
    ("content", "message"), [(b"short", "expected at least"), (b"\xff\xfe" * 100, "expected UTF-8"), (None, "No such")]
)
def test_bad_corpus_is_named(tmp_path, checkpoint, content, message):
    path = tmp_path / "corpus.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PowerinferError, match=message) as error:
        calibration_windows(checkpoint, [path], 64, 32)
    assert "corpus.txt" in str(error.value)


def test_a_long_binary_file_is_refused(tmp_path, checkpoint):
    path = tmp_path / "corpus.bin"
    path.write_bytes(bytes(range(256)) * 1000)
    with pytest.raises(PowerinferError, match="expected UTF-8"):
        calibration_windows(checkpoint, [path], 64, 32)
