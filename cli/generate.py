"""`powerinfer generate`: one answer, or a batch of them."""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from powerinfer_tools.cli import console, options

if TYPE_CHECKING:
    from powerinfer_tools.assistant import Answer, Assistant, Settings

Prompt = Annotated[
    str | None, typer.Option("-p", "--prompt", metavar="TEXT", rich_help_panel=options.TEXT, help="What to answer.")
]
PromptFile = Annotated[
    Path | None,
    typer.Option(
        "-f", "--file", metavar="FILE", rich_help_panel=options.TEXT, help="Read the prompt here; - is stdin."
    ),
]
Raw = Annotated[
    bool,
    typer.Option(
        "--raw",
        rich_help_panel=options.TEXT,
        help="Continue the text as it is, no chat template; control tokens that it spells count.",
    ),
]
Batch = Annotated[
    Path | None,
    typer.Option(
        "--batch",
        metavar="FILE",
        rich_help_panel=options.TEXT,
        help='A JSON object a line: "prompt" or "messages", and if wanted "id", "system" and sampling fields.',
    ),
]


def generate(
    artifact: options.OptionalArtifact = None,
    prompt: Prompt = None,
    file: PromptFile = None,
    batch: Batch = None,
    raw: Raw = False,
    system: options.System = None,
    chat_template: options.ChatTemplate = None,
    no_chat_template: options.NoChatTemplate = False,
    max_tokens: options.MaxTokens = None,
    temp: options.Temp = options.TEMP,
    top_k: options.TopK = options.TOP_K,
    top_p: options.TopP = options.TOP_P,
    min_p: options.MinP = options.MIN_P,
    repeat_penalty: options.RepeatPenalty = options.REPEAT_PENALTY,
    repeat_last_n: options.RepeatLastN = options.REPEAT_LAST_N,
    seed: options.SamplingSeed = None,
    stop: options.Stop = None,
    threads: options.Threads = None,
    ctx_size: options.CtxSize = None,
    vram: options.Vram = options.VRAM,
    ram: options.Ram = None,
    mode: options.Mode = options.MODE,
    output: options.OptionalOutput = None,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    timings: options.Timings = False,
) -> None:
    """Answer one prompt, a file, stdin or a batch of requests.

    A model with a chat template is asked in its template; one without, or with --raw, continues the text.

    Examples:

        powerinfer generate model.gguf -p "Name three rivers." -n 64

        git diff | powerinfer generate model.gguf --system "Sum up this change."

        powerinfer generate model.gguf --raw -p "Once upon a time" --temp 0

        powerinfer generate model.gguf --batch requests.jsonl -o answers.jsonl
    """
    from powerinfer_tools.assistant import open_assistant
    from powerinfer_tools.default_model import default_artifact
    from powerinfer_tools.engine import Sampling

    check_usage(prompt, file, batch, output)
    sampling = Sampling(temp, top_k, top_p, min_p, repeat_penalty, repeat_last_n)
    settings = options.settings(sampling, seed, max_tokens, stop, verbose)
    text = None if batch else read_prompt(prompt, file)
    with (
        open_assistant(
            artifact or default_artifact(),
            ctx_size=ctx_size,
            threads=threads,
            mode=mode,
            ram=ram,
            vram=vram,
            say=console.say,
            template_file=chat_template,
            use_template=not no_chat_template,
        ) as assistant,
        console.llama_timings(assistant.timings, timings),
    ):
        raw = raw or (assistant.template is None and not no_chat_template)
        if batch is not None:
            run_batch(assistant, batch, output, settings, system, raw, force)
            return
        assert text is not None
        answer = assistant.ask(text, settings, system=system, raw=raw)
        if json:
            console.print_json(answer.finished().document())
        else:
            stream(answer)
        if verbose:
            console.say(console.timings(answer), style="dim")


def check_usage(prompt: str | None, file: Path | None, batch: Path | None, output: Path | None) -> None:
    """One source of prompts; -o is for batches."""
    from powerinfer_tools.errors import PowerinferError

    if sum(source is not None for source in (prompt, file, batch)) > 1:
        raise PowerinferError("expected one of -p, -f and --batch, found more", "usage")
    if output is not None and batch is None:
        raise PowerinferError("-o goes with --batch; an answer goes to stdout: … > FILE", "usage")


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The text of -p, -f or stdin; stdin is read when it is no terminal."""
    from powerinfer_tools.errors import PowerinferError

    if prompt is not None and prompt != "-":
        return prompt
    if file is not None and str(file) != "-":
        try:
            return file.read_bytes().decode("utf-8", "replace")
        except OSError as error:
            raise PowerinferError(f"{file}: {error.strerror}", "usage") from error
    if prompt is None and file is None and sys.stdin.isatty():
        raise PowerinferError("expected a prompt: -p TEXT, -f FILE, or text on stdin", "usage")
    text = sys.stdin.read().removesuffix("\n")
    if not text:
        raise PowerinferError("expected a prompt on stdin, found nothing", "usage")
    return text


def stream(answer: "Answer") -> None:
    """Writes the answer to stdout as it comes, and a newline if it has none at its end."""
    for piece in answer:
        console.write(piece)
    if not answer.text.endswith("\n"):
        console.write("\n")


def run_batch(
    assistant: "Assistant",
    batch: Path,
    output: Path | None,
    settings: "Settings",
    system: str | None,
    raw: bool,
    force: bool,
) -> None:
    """Answers requests in their order, to `output` when all are done or to stdout at once; exits 1 if one failed."""
    from powerinfer_tools.batch import answers, read_requests
    from powerinfer_tools.files import atomic_write, canonical_json, check_writable

    if output is not None:
        check_writable(output, force)
    requests = read_requests(batch)
    failed = 0
    target = atomic_write(output, force) if output is not None else nullcontext(sys.stdout.buffer)
    with console.progress() as progress, target as out:
        for record in answers(assistant, requests, settings, system=system, raw=raw, progress=progress):
            failed += "error" in record
            out.write(canonical_json(record).encode("utf-8", "replace") + b"\n")
            out.flush()
    if output is not None:
        console.wrote(output)
    if failed:
        console.say(f"{failed} of {len(requests)} requests failed")
        raise typer.Exit(1)
