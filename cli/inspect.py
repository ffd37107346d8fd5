"""`powerinfer inspect`: what is in a file."""

from pathlib import Path
from typing import Annotated, Any

import typer

from powerinfer_tools.cli import console, options


def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An artifact, anything else of ours, or a checkpoint.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte and check it.")] = False,
    template: Annotated[
        bool, typer.Option("--template", help="Print the chat template's text and nothing else.")
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Show what a file holds: sizes, digests, where it came from, and each layer's plan.

    Examples:

        powerinfer inspect model.gguf

        powerinfer inspect model.gguf --verify

        powerinfer inspect model.activations --json | jq '.layers[].active_share'
    """
    from powerinfer_tools.describe import describe

    if template:
        console.write(template_of(file) + "\n")
        return
    if verify:
        console.say(f"reading all of {file}")
    description = describe(file, verify)
    if json:
        console.print_json(description)
    else:
        show(description)


def template_of(file: Path) -> str:
    """The template's text; it is never rendered here."""
    from powerinfer_tools.artifact.read import open_artifact
    from powerinfer_tools.checkpoint import open_checkpoint
    from powerinfer_tools.describe import kind_of
    from powerinfer_tools.errors import PowerinferError

    kind = kind_of(file)
    if kind not in ("artifact", "checkpoint"):
        raise PowerinferError(f"{file}: expected an artifact or a checkpoint, found {kind}", "mismatch")
    text = (open_artifact(file) if kind == "artifact" else open_checkpoint(file)).chat_template
    if text is None:
        raise PowerinferError(f"{file}: expected a chat template, found none", "mismatch")
    return text


def show(description: dict[str, Any]) -> None:
    """One line a value, then a table for each group of values and for the layers."""
    rows: list[tuple[str, str]] = []
    groups: list[tuple[str, Any]] = []
    for name, value in description.items():
        if isinstance(value, dict | list) and value:
            groups.append((name, value))
        elif value not in (None, "", [], {}) and (name, value) != ("verified", False):
            rows.append((name, text_of(name, value)))
    console.table("", ["", ""], rows)
    for name, value in groups:
        print()
        if isinstance(value, list) and isinstance(value[0], dict):
            columns = list(value[0])
            console.table(name, columns, [[text_of(c, row.get(c)) for c in columns] for row in value])
        elif isinstance(value, list):
            console.table(name, [""], [[text_of(name, v)] for v in value])
        else:
            console.table(name, ["", ""], [(key, text_of(name, v)) for key, v in flat(value).items()])


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def text_of(name: str, value: object) -> str:
    """A value for people."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if "bytes" in name and isinstance(value, int):
        return f"{value} ({console.size(value)})"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)
