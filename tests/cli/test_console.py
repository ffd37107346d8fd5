"""What people see: sizes, progress, tables, JSON; and how sizes are read."""

import json
from pathlib import Path

import pytest
import typer

from powerinfer_tools.cli import console
from powerinfer_tools.cli.options import parse_size


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("8GiB", 8 << 30),
        ("512MiB", 512 << 20),
        ("1.5GiB", 3 << 29),
        ("4 kib", 4096),
        ("2GB", 2 * 10**9),
        ("7k", 7000),
        ("4096", 4096),
        ("0", 0),
        (12, 12),
    ],
)
def test_sizes(text: str | int, n_bytes: int) -> None:
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "8GX", "8Gi B x", "1e9", "٣GiB x"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="expected a size like 8GiB"):
        parse_size(text)


@pytest.mark.parametrize("text", ["1049600GiB", "17179869184GiB", "99999999999999999999GiB"])
def test_sizes_beyond_any_machine(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="expected at most 1024 TiB, found"):
        parse_size(text)


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 29, "1.5 GiB"), (1 << 42, "4096.0 GiB")],
)
def test_sizes_for_people(n_bytes: int, text: str) -> None:
    assert console.size(n_bytes) == text


def test_progress_without_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 12.0, 13.0, 14.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    with console.progress() as draw:
        for done in range(1, 6):
            draw("layers", done, 5)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "layers: 3/5, 12 s\nlayers: 5/5, 14 s\n"


def test_quiet(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(console.console, "quiet", True)
    with console.progress() as draw:
        draw("layers", 5, 5)
    (tmp_path / "x").write_text("x")
    console.wrote(tmp_path / "x", "powerinfer chat x")
    assert capsys.readouterr() == ("", "")


def test_wrote_names_size_and_next_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / ("long" * 40)
    path.write_bytes(bytes(2048))
    console.wrote(path, "powerinfer chat [bold]x")
    assert capsys.readouterr().err == f"wrote {path} (2.0 KiB)\nnext: powerinfer chat [bold]x\n"


def test_table_is_data(capsys: pytest.CaptureFixture[str]) -> None:
    console.table("layers", ["layer", "mode"], [(0, "[gate]"), (1, "predictor")])
    captured = capsys.readouterr()
    assert captured.err == ""
    assert [line.split() for line in captured.out.splitlines()] == [
        ["layers"],
        ["layer", "mode"],
        ["0", "[gate]"],
        ["1", "predictor"],
    ]


def test_json_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_json({"text": "é\n"})
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out) == {"text": "é\n"}


def test_a_terminal_gets_no_control_characters(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    text = "a\x1b[31mb\x9b\tc\n"
    console.write(text)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    console.write(text)
    assert capsys.readouterr().out == text + "a\ufffd[31mb\ufffd\tc\n"
