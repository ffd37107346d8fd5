"""What holds for every command: help, unknown flags, closed stdout, no colours, shared flags, quick start."""

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer

from powerinfer_tools.cli.main import COMMANDS, app
from tests.cli.conftest import Result

Program = Callable[..., Result]

NEEDS_NOTHING = {"machine"}  # measures this machine when called without arguments


def program(*args: str, env: dict[str, str] | None = None, **how: Any) -> "subprocess.CompletedProcess[str]":
    """The program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "powerinfer_tools.cli.main", *args],
        env={**os.environ, **(env or {})},
        text=True,
        check=False,
        timeout=120,
        **{"stdin": subprocess.DEVNULL, "capture_output": True, **how},
    )


def parameters(command: str) -> dict[str, inspect.Parameter]:
    """The parameters of a command's function."""
    function = getattr(import_module(f"powerinfer_tools.cli.{command}"), command)
    return dict(inspect.signature(function).parameters)


def test_no_arguments_show_the_help(powerinfer: Program) -> None:
    result = powerinfer()
    assert result.code == 2
    assert result.out == ""
    assert "Commands, in the order of the pipeline" in result.err


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_command(powerinfer: Program, flag: str) -> None:
    result = powerinfer(flag)
    assert result.code == 0
    for name, line in COMMANDS.items():
        assert f"  {name}" in result.out
        assert line in result.out


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_of_a_command_has_examples(powerinfer: Program, command: str, flag: str) -> None:
    result = powerinfer(command, flag)
    assert result.code == 0
    assert f"Usage: powerinfer {command}" in result.out
    assert result.out.count(f"powerinfer {command}") > 1


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_flag_is_one_line(powerinfer: Program, command: str) -> None:
    result = powerinfer(command, "--no-such-flag")
    assert result.code == 2
    assert result.out == ""
    assert result.err.count("\n") == 1
    assert "--no-such-flag" in result.err


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - NEEDS_NOTHING))
def test_a_command_without_arguments_is_one_line(powerinfer: Program, command: str) -> None:
    result = powerinfer(command)
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("powerinfer: ")
    assert result.err.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_lines_of_help_are_short(command: str) -> None:
    assert 10 < len(COMMANDS[command]) <= 70


def test_shared_flags_are_the_same_everywhere() -> None:
    seen: dict[str, tuple[str, Any, Any]] = {}
    for command in COMMANDS:
        for name, parameter in parameters(command).items():
            kind, info = parameter.annotation.__metadata__[0], parameter.annotation.__origin__
            if isinstance(kind, typer.models.ArgumentInfo):
                continue
            required = parameter.default is parameter.empty
            for flag in kind.param_decls or ():
                found = (name, info, None if required else parameter.default)
                before = seen.setdefault(flag, found)
                assert (before[0], before[2] if not required else None) == (name, found[2]), f"{command} {flag}"
                assert _base(before[1]) == _base(info), f"{command} {flag}"


def _base(annotation: Any) -> Any:
    """The type without the None of flags that need not be given."""
    from typing import get_args

    parts = [part for part in get_args(annotation) if part is not type(None)]
    return parts[0] if len(parts) == 1 and type(None) in get_args(annotation) else annotation


def test_a_mistyped_command_is_suggested(powerinfer: Program) -> None:
    result = powerinfer("generte")
    assert result.code == 2
    assert "Did you mean 'generate'?" in result.err


def test_errors_as_json(powerinfer: Program) -> None:
    import json

    for args in (["inspect", "missing", "--json"], ["inspect", "--json", "--what"], ["generate", "-n", "x", "--json"]):
        result = powerinfer(*args)
        assert result.code == 2
        error = json.loads(result.out)["error"]
        assert set(error) == {"kind", "message"}
        assert error["kind"] == "usage"
        assert result.err == f"powerinfer: {error['message']}\n"


def test_debug_shows_the_traceback(powerinfer: Program) -> None:
    assert "Traceback" not in powerinfer("inspect", "missing").err
    for args in (["inspect", "missing", "--debug"], ["--debug", "inspect", "missing"]):
        assert "Traceback" in powerinfer(*args).err


def test_an_unforeseen_error_is_one_line(powerinfer: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    from powerinfer_tools import describe

    def fail(*args: object) -> None:
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setattr(describe, "describe", fail)
    result = powerinfer("inspect", "x")
    assert result.code == 1
    assert result.err == "powerinfer: internal error: ZeroDivisionError: by zero (--debug shows where)\n"


def test_interruption_ends_with_130(powerinfer: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    from powerinfer_tools import describe

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(describe, "describe", interrupt)
    result = powerinfer("inspect", "x")
    assert (result.code, result.out) == (130, "")
    assert "Traceback" not in result.err


def test_version() -> None:
    from powerinfer_tools import __version__

    assert program("--version").stdout == f"powerinfer {__version__}\n"
    assert program("--version", "-v").stdout.startswith(f"powerinfer {__version__}, native")


@pytest.mark.parametrize("args", [["--help"], ["generate", "--help"], ["--version"]])
def test_a_closed_stdout_is_quiet(args: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = program(*args, capture_output=False, stdout=write, stderr=subprocess.PIPE)
    finally:
        os.close(write)
    assert done.stderr == ""
    assert done.returncode == 1


@pytest.mark.parametrize("args", [["--help"], ["generate", "--help"], ["generate", "--oops"]])
def test_no_colours_where_there_is_no_terminal(args: list[str]) -> None:
    for env in ({}, {"NO_COLOR": "1", "TERM": "xterm-256color"}):
        done = program(*args, env=env)
        assert "\x1b" not in done.stdout + done.stderr


def test_starting_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'gguf', 'transformers', 'tokenizers', 'pulp', 'safetensors', 'jinja2'}"
    commands = ", ".join(f"'powerinfer_tools.cli.{name}'" for name in COMMANDS)
    code = (
        f"import importlib, sys\nfor m in ({commands},): importlib.import_module(m)\nprint({heavy} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_file_of_a_command_has_one_command() -> None:
    folder = Path(import_module("powerinfer_tools.cli").__path__[0])
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__", "main", "options", "console", "habits"}
    assert modules == set(COMMANDS)
    assert app.registered_commands == []
