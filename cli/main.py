"""The program `powerinfer`: its commands, and how every failure ends."""

import json
import os
import signal
import sys
import traceback
from importlib import import_module
from io import TextIOWrapper
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from powerinfer_tools import __version__
from powerinfer_tools.cli import console
from powerinfer_tools.cli.habits import Command
from powerinfer_tools.errors import PowerinferError

COMMANDS = {
    "sparsify": "Turn a dense gated model into an exactly sparse one",
    "profile": "Count how often each neuron fires on a text",
    "train": "Train predictors that foresee which neurons fire",
    "place": "Decide which neurons go to GPU memory, RAM and disk",
    "split": "Write the artifact: sorted neurons, predictors, tokenizer",
    "build": "All of these steps, resumed where they stopped",
    "chat": "Talk with a model",
    "generate": "Answer a prompt, a file, stdin or a batch of requests",
    "bench": "Measure speed, bytes a token and share of the memory's ceiling",
    "eval": "Compare sparse answers with dense ones on a text",
    "inspect": "Show what a file holds, and whether it is whole",
    "machine": "Measure this machine's memories",
}
"""Command: its line of help. The command is the function of that name in cli/<name>.py. The order is the pipeline's:
sparsify, profile, train, place, split, build, chat, generate, bench, eval, inspect, machine."""

CONTEXT = {"help_option_names": ["-h", "--help"]}

INTERRUPTED = 130  # the exit code that typer gives Ctrl-C

# typer keeps its click private: the public BadParameter leads to UsageError and ClickException
_ClickException = typer.BadParameter.__mro__[2]


HELP = """\
powerinfer: run sparse large language models on an ordinary PC

Usage: powerinfer COMMAND [OPTIONS]     (powerinfer COMMAND --help for its options)

Commands, in the order of the pipeline:
{commands}

  --version             Show the version; with -v, the native engine's kernels too.
  --debug               After any command: show the traceback of an error.
  --install-completion  Complete commands and flags in this shell (--show-completion to see it).
  -h, --help            Show this.

Flags of llama.cpp and the first PowerInfer are understood, or answered with what does it here.

Exit codes: 0 done, 1 failed, 2 usage or bad input, 130 interrupted.
"""


class LazyGroup(TyperGroup):
    """Imports a command's module only when that command is asked for."""

    def __init__(self, **attrs: Any) -> None:
        super().__init__(**attrs)
        self.commands: dict[str, Any] = dict.fromkeys(COMMANDS)

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in COMMANDS and self.commands[cmd_name] is None:
            self.commands[cmd_name] = _load(cmd_name)
        return self.commands.get(cmd_name)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        rows = "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
        formatter.write(HELP.format(commands=rows))


def _load(name: str) -> Any:
    module = import_module(f"powerinfer_tools.cli.{name}")
    single = typer.Typer(add_completion=False, context_settings=CONTEXT)
    single.command(name, cls=Command)(getattr(module, name))
    return typer.main.get_command(single)


app = typer.Typer(cls=LazyGroup, context_settings=CONTEXT, invoke_without_command=True)


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose")] = False,
) -> None:
    if version:
        print(f"powerinfer {__version__}{_native_version() if verbose else ''}")
    elif context.invoked_subcommand is None:
        print(context.get_help(), file=sys.stderr)
        raise typer.Exit(2)


def _native_version() -> str:
    from powerinfer_tools.engine import native

    try:
        return f", native kernels {native.kernels()}"
    except PowerinferError as error:
        return f", {error}"


def main() -> None:
    """Runs the program on the process's arguments and exits."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's threads spin else, and starve each other
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, TextIOWrapper):  # None where a parent closed it
            stream.reconfigure(errors="replace")  # bytes that are no UTF-8 end no run
    code = run(sys.argv[1:])
    if code == INTERRUPTED:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # one more Ctrl-C while Python ends must not kill it
    sys.exit(code)


def run(args: list[str]) -> int:
    """Runs one command; returns its exit code. Every failure is one line on stderr."""
    flags = args[: args.index("--")] if "--" in args else args
    debug = "--debug" in flags
    if debug:
        args = [arg for i, arg in enumerate(args) if i >= len(flags) or arg != "--debug"]
    console.console.quiet = False
    try:
        code = typer.main.get_command(app).main(args, "powerinfer", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        return _reader_left()
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _report(error, "--json" in flags)


def _reader_left() -> int:
    """stdout was closed, as by `| head`: nothing to say, and nobody to say it to."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 1


def _report(error: Exception, as_json: bool) -> int:
    kind, message, code = _explain(error)
    line = console.harmless(" ".join(message.split()))
    print(f"powerinfer: {line}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": {"kind": kind, "message": line}}, ensure_ascii=False), flush=True)
    return code


def _explain(error: Exception) -> tuple[str, str, int]:
    """Kind, message and exit code of an error."""
    if isinstance(error, PowerinferError):
        return error.kind, str(error), error.exit_code
    if isinstance(error, _ClickException):
        return "usage", _usage(error), 2
    if isinstance(error, typer.Abort):
        return "usage", "input ended before an answer was given", 1
    if isinstance(error, MemoryError):
        return "memory", f"out of memory: {error}".rstrip(": "), 1
    if isinstance(error, OSError):
        return "io", f"{error.filename or 'input or output'}: {error.strerror or error}", 1
    return "internal", f"internal error: {type(error).__name__}: {error} (--debug shows where)", 1


def _usage(error: Any) -> str:
    context = getattr(error, "ctx", None)
    return f"{error.format_message()} (see: {context.command_path if context else 'powerinfer'} --help)"


if __name__ == "__main__":
    main()
