"""Flags of llama.cpp and of the first PowerInfer: taken where they mean the same, else answered."""

from collections import deque
from typing import Any

from typer.core import TyperCommand

from powerinfer_tools.errors import PowerinferError

RENAMED = {
    "-m": ("ARTIFACT", "MODEL", "FILE"),
    "--model": ("ARTIFACT", "MODEL", "FILE"),
    "-p": ("--prompt-tokens",),
    "--n-prompt": ("--prompt-tokens",),
    "-n": ("--decode-tokens",),
    "--n-gen": ("--decode-tokens",),
    "--predict": ("--max-tokens", "--decode-tokens"),
    "--n-predict": ("--max-tokens", "--decode-tokens"),
    "-r": ("--stop", "--repeats"),
    "--reverse-prompt": ("--stop",),
    "--repetitions": ("--repeats",),
    "-sys": ("--system",),
    "--system-prompt": ("--system",),
    "--chat-template-file": ("--chat-template",),
    "-f": ("--corpus",),
    "--file": ("--corpus",),
    "--vram-budget": ("--vram",),
}
"""Theirs: ours, the first that the command has. A command's own flag goes before; upper case is its argument."""

UNITS = {"--vram-budget": "GiB"}
"""What their numbers count, where ours may be given with a unit."""

LEFT_OUT = {("max_tokens", "-1"), ("max_tokens", "-2"), ("seed", "-1"), ("threads", "-1")}
"""Values that say what holds without the flag, where it need not be given."""

NEEDLESS = {
    **dict.fromkeys("--no-mmap --reset-gpu-index --no-display-prompt --log-disable --jinja".split(), ""),
    **dict.fromkeys("-i --interactive --interactive-first -ins --instruct -cnv --conversation".split(), "chat"),
}
"""What is so by itself, in this command or, where none is named, in all."""

_ANSWERS = {
    "--vram SIZE uses so much of the first card: what goes there is found at each load, by neurons, not layers": (
        "-ngl --n-gpu-layers --gpu-layers -ot --override-tensor -cmoe --cpu-moe -ncmoe --n-cpu-moe "
        "-ts --tensor-split -sm --split-mode -mg --main-gpu -dev --device -nommq --no-mul-mat-q"
    ),
    "what goes to the card is found at each load: without --vram SIZE nothing does": "--disable-gpu-index",
    "weights are read into memory, not locked there: --ram SIZE keeps the process within what is free": "--mlock",
    "threads are not bound to nodes: numactl can do it": "--numa",
    "-t N is for prompts, too": "-tb --threads-batch",
    "the engine cuts prompts into pieces by itself": "-b --batch-size -ub --ubatch-size",
    "there is one way to compute attention": "-fa --flash-attn",
    "keys and values are kept in f16": "--memory-f32 -ctk --cache-type-k -ctv --cache-type-v",
    "thresholds are chosen when predictors are trained: powerinfer train --recall X": "--sparse-threshold",
    "powerinfer generate -p TEXT answers one prompt": "-p --prompt --random-prompt",
    "powerinfer generate -f FILE answers a file": "-f --file",
    "powerinfer chat is interactive": "-i --interactive --interactive-first -ins --instruct -cnv --conversation",
    "powerinfer generate answers once": "-st --single-turn",
    "powerinfer generate --raw continues a text": "-no-cnv --no-conversation",
    "write the characters themselves: powerinfer generate -f FILE takes any text": "-e --escape",
    "--system TEXT takes the text itself": "-sysf --system-prompt-file",
    "--chat-template FILE says what stands around a message": "--in-prefix --in-prefix-bos --in-suffix",
    'in powerinfer chat """ begins and ends a message of several lines': "--multiline-input",
    "powerinfer chat writes plain text, and reads plain lines from a pipe": "--color --simple-io",
    "powerinfer chat keeps --system TEXT when the context is full, and drops the oldest turns": "--keep",
    "powerinfer bench --decode-tokens N goes on whatever the tokens are": "--ignore-eos",
    "tokens are drawn by --temp, --top-k, --top-p and --min-p": (
        "--tfs --typical --typical-p --mirostat --mirostat-lr --mirostat-ent --dynatemp-range --dynatemp-exp "
        "--xtc-probability --xtc-threshold"
    ),
    "--repeat-penalty X is the one penalty": "--presence-penalty --frequency-penalty --no-penalize-nl --dry-multiplier",
    "nothing constrains what is drawn, --stop TEXT ends it": (
        "-l --logit-bias --grammar --grammar-file -j --json-schema"
    ),
    "there is no guidance: --system TEXT can say it": "--cfg-scale --cfg-negative-prompt --cfg-negative-prompt-file",
    "powerinfer chat keeps what it computed while it runs, nothing is kept on disk": (
        "--prompt-cache --prompt-cache-all --prompt-cache-ro"
    ),
    "rotation is as the checkpoint's config has it: powerinfer build reads it": (
        "--rope-scaling --rope-scale --rope-freq-base --rope-freq-scale --yarn-orig-ctx --yarn-ext-factor "
        "--yarn-attn-factor --yarn-beta-fast --yarn-beta-slow"
    ),
    "merge the adapter into the checkpoint, then powerinfer build": "--lora --lora-scaled --lora-base",
    "fetch the checkpoint, then powerinfer build": "-hf -hfr --hf-repo -mu --model-url",
    "there is no draft model: --mode sparse skips the neurons that do not fire": (
        "-md --model-draft -ngld --n-gpu-layers-draft --gpu-layers-draft --draft -pa --p-accept -ps --p-split"
    ),
    "powerinfer generate --batch FILE answers many requests": "-np --parallel -ns --sequences -cb --cont-batching",
    "models here read text and write text": "--mmproj --image --embedding --infill",
    "powerinfer eval --corpus FILE --tokens N measures perplexity": (
        "--perplexity --all-logits --logits-all --ppl-stride --ppl-output-type --hellaswag --hellaswag-tasks --chunks"
    ),
    "powerinfer generate --json shows the prompt's tokens": "--verbose-prompt",
    "the result goes to stdout, as one document with --json": "-o --output",
    "what is said about the run goes to stderr, more of it with -v: 2> FILE keeps it": (
        "-ld --logdir --log-test --log-enable --log-file --log-new --log-append"
    ),
}
ANSWERED = {flag: answer for answer, flags in _ANSWERS.items() for flag in flags.split()}
"""What nothing here means, or not in this command, and what to do instead."""


class Command(TyperCommand):
    """A command that understands old habits."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if ctx.resilient_parsing else translated(args, self))


def translated(args: list[str], command: TyperCommand) -> list[str]:
    """The arguments in the command's own flags. Errors: one line that answers all flags with no meaning here."""
    own = _own(command)
    rest, ours, answers = deque(args), list[str](), list[str]()
    while rest:
        arg = rest.popleft()
        if arg == "--":
            ours += [arg, *rest]
            break
        if not arg.startswith("-"):
            ours.append(arg)
            continue
        flag, equals, value = arg.partition("=")
        flag = flag.replace("_", "-") if flag.startswith("--") else flag
        name = next((name for name in (flag, *RENAMED.get(flag, ())) if name in own), None)
        if name is not None and getattr(own[name], "is_flag", False):
            ours.append(name + equals + value)
        elif name is not None:
            values = [value] if equals else [rest.popleft()] if rest else []
            ours += _spelled(own[name], name, [value + UNITS.get(flag, "") for value in values])
        elif NEEDLESS.get(flag) in ("", command.name):
            continue
        elif flag in ANSWERED:
            answers.append(f"{flag}: {ANSWERED[flag]}")
        else:
            ours.append(arg)
    if answers:
        raise PowerinferError(f"no such option: {'; '.join(answers)}", "usage")
    return ours


def _own(command: TyperCommand) -> dict[str, Any]:
    """The command's options by each of their flags, its argument by the name that the help shows."""
    return {
        flag: parameter
        for parameter in command.params
        for flag in (parameter.opts if parameter.param_type_name == "option" else [str(parameter.metavar)])
    }


def _spelled(parameter: Any, name: str, values: list[str]) -> list[str]:
    """A parameter and its value as the command line has them; an argument is its value alone."""
    if parameter.default is None and (parameter.name, *values) in LEFT_OUT:
        return []
    return values if parameter.param_type_name == "argument" else [name, *values]
