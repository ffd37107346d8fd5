"""`powerinfer chat`: a conversation in the terminal, or from a pipe."""

import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from powerinfer_tools.cli import console, options

if TYPE_CHECKING:
    from powerinfer_tools.assistant import Answer, Assistant, Settings


def chat(
    artifact: options.OptionalArtifact = None,
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
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    timings: options.Timings = False,
) -> None:
    """Talk with a model. /help lists what can be typed; Ctrl-C stops an answer, Ctrl-D ends.

    Where stdin is no terminal, each line is a turn. With --json the whole conversation is printed at its end.

    Examples:

        powerinfer chat model.gguf

        powerinfer chat model.gguf --system "Answer in one sentence." --temp 0.3

        printf 'Hello\\nAnd in French?\\n' | powerinfer chat model.gguf
    """
    from powerinfer_tools.assistant import open_assistant
    from powerinfer_tools.default_model import default_artifact
    from powerinfer_tools.engine import Sampling

    sampling = Sampling(temp, top_k, top_p, min_p, repeat_penalty, repeat_last_n)
    settings = options.settings(sampling, seed, max_tokens, stop, verbose)
    path = artifact or default_artifact()
    with (
        open_assistant(
            path,
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
        talk = Chat(assistant, settings, system, verbose, silent=json)
        if sys.stdin.isatty():
            talk.greet(mode)
        talk.run()
        if json:
            console.print_json({"messages": talk.conversation(), "answers": talk.documents})


class Chat:
    """The conversation and what was typed about it. Answers go to stdout, everything else to stderr."""

    def __init__(
        self, assistant: "Assistant", settings: "Settings", system: str | None, verbose: bool, silent: bool
    ) -> None:
        self.assistant, self.settings, self.system = assistant, settings, system
        self.verbose, self.silent = verbose, silent
        self.messages: list[dict[str, Any]] = []
        self.documents: list[dict[str, Any]] = []
        self.read_text = ""  # of /read, put before the next message
        self.last: Answer | None = None
        self.done = False

    def greet(self, mode: str) -> None:
        """The banner: what runs, and how to get help."""
        artifact, engine = self.assistant.artifact, self.assistant.engine
        size = console.size(artifact.n_bytes)
        console.say(f"{artifact.config.name}, {artifact.quant}, {size}, {mode}", style="bold")
        console.say(f"context {engine.ctx_size} tokens; /help for commands, Ctrl-D to end", style="dim")
        if self.assistant.template is None:
            console.say('no chat template: the model gets plain "User: … Assistant:" lines', style="yellow")

    def run(self) -> None:
        """Turn after turn until /bye or the end of the input."""
        from powerinfer_tools.errors import PowerinferError

        reader = Reader(sorted(COMMANDS))
        while not self.done and (line := reader.message()) is not None:
            try:
                if line.startswith("/") and not reader.quoted:
                    self.command(line)
                elif line.strip():
                    self.turn(line)
            except PowerinferError as error:
                if not sys.stdin.isatty():
                    raise
                console.say(str(error), style="red")

    def command(self, line: str) -> None:
        """Obeys a line that begins with a slash; it never goes to the model."""
        name, _, rest = line[1:].strip().partition(" ")
        if name in COMMANDS:
            COMMANDS[name](self, rest.strip())
        else:
            console.say(f'no command /{name}; to say it, write """/{name} …"""', style="yellow")
            show_help(self, "")

    def turn(self, text: str) -> None:
        """Says something and shows the answer; an interrupted answer is kept as far as it came."""
        self.messages.append({"role": "user", "content": self.read_text + text})
        try:
            self.reply()
        finally:
            if self.messages and self.messages[-1]["role"] == "user":
                self.messages.pop()  # nothing was answered: templates want turns to alternate
            else:
                self.read_text = ""

    def reply(self) -> None:
        """Answers the last message."""
        prompt, dropped = self.assistant.fitting_prompt(self.conversation())
        if dropped:
            self.messages = self.messages[dropped:]
            console.say(f"the context is full: the oldest {dropped} messages were dropped", style="yellow")
        answer = self.last = self.assistant.answer(prompt, self.settings)
        try:
            self.show(answer)
        except KeyboardInterrupt:
            console.say("(stopped)", style="yellow")
        if answer.text or answer.finish_reason:
            self.messages.append({"role": "assistant", "content": answer.text})
            self.documents.append(answer.document())
        if answer.finish_reason == "length":
            console.say("(cut: -n or the end of the context)", style="yellow")
        if self.verbose:
            console.say(console.timings(answer), style="dim")

    def show(self, answer: "Answer") -> None:
        """Writes the answer to stdout as it comes."""
        with closing(answer.__iter__()) as pieces:
            try:
                for piece in pieces:
                    if not self.silent:
                        console.write(piece)
            finally:
                if not self.silent and not answer.text.endswith("\n"):
                    console.write("\n")

    def conversation(self) -> list[dict[str, Any]]:
        """All messages, the system message first."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + self.messages


class Reader:
    """Messages from stdin: a line each, or what stands between two \"\"\"."""

    def __init__(self, commands: list[str]) -> None:
        self.quoted = False
        self._terminal = sys.stdin.isatty()
        if self._terminal and sys.stdout.isatty():
            _complete(["/" + name for name in commands])

    def message(self) -> str | None:
        """The next message; None at the end of the input."""
        line = self._line("> ")
        self.quoted = line is not None and line.startswith('"""')
        if line is None or not self.quoted:
            return line
        text = line[3:]
        while '"""' not in text and (line := self._line("… ")) is not None:
            text += "\n" + line
        return text.partition('"""')[0].strip("\n")

    def _line(self, prompt: str) -> str | None:
        if self._terminal and sys.stdout.isatty():
            try:
                return input(prompt)
            except EOFError:
                console.say()
                return None
        if self._terminal:
            sys.stderr.write(prompt)
            sys.stderr.flush()
        line = sys.stdin.readline()
        return line.removesuffix("\n") if line else None


def _complete(words: list[str]) -> None:
    """Line editing and completion of commands, where Python has readline."""
    try:
        import readline
    except ImportError:
        return

    def complete(text: str, state: int) -> str | None:
        found = [word for word in words if text and word.startswith(text)]
        return found[state] if state < len(found) else None

    readline.set_completer_delims(" ")
    readline.set_completer(complete)
    readline.parse_and_bind("tab: complete")


HELP = '''\
/help             this list
/clear            forget the conversation
/regen            answer the last message again
/set NAME VALUE   change a setting; /set alone shows them
/system TEXT      change the system message; /system alone removes it
/read FILE        put a file's text before the next message
/save FILE        write the conversation as JSON, a request for generate --batch
/show             the conversation so far
/stats            speed, memory and active neurons of the last answer
/bye, /exit       end, as Ctrl-D does
"""               begin and end a message of several lines
Ctrl-C            stop the answer; at the prompt, end'''


def show_help(chat: Chat, rest: str) -> None:
    """/help."""
    console.say(HELP)


def clear(chat: Chat, rest: str) -> None:
    """/clear: the system message stays."""
    chat.messages, chat.read_text, chat.last = [], "", None
    console.say("the conversation is forgotten")


def regenerate(chat: Chat, rest: str) -> None:
    """/regen: the last answer anew, with another seed."""
    if not chat.messages:
        console.say("there is no answer to make again")
        return
    chat.messages.pop()
    text = chat.messages.pop()["content"]
    chat.settings = replace(chat.settings, seed=(chat.settings.seed + 1) % 2**64)
    chat.turn(text)


def set_value(chat: Chat, rest: str) -> None:
    """/set NAME VALUE, by the rules of batch requests."""
    from powerinfer_tools.batch import parse_settings, settings_dict

    if rest:
        name, _, value = rest.partition(" ")
        chat.settings = parse_settings(_setting(name, value.strip()), chat.settings)
    console.say("  ".join(f"{name} {value}" for name, value in settings_dict(chat.settings).items()))


def _setting(name: str, value: str) -> dict[str, Any]:
    import json

    name = name.lstrip("-").replace("-", "_")
    name = {"temp": "temperature", "n": "max_tokens"}.get(name, name)
    try:
        return {name: value if name == "stop" else json.loads(value)}
    except ValueError:
        return {name: value}


def set_system(chat: Chat, rest: str) -> None:
    """/system TEXT."""
    chat.system = rest or None
    console.say("system message set" if rest else "no system message")


def read_file(chat: Chat, rest: str) -> None:
    """/read FILE."""
    try:
        text = Path(rest).expanduser().read_bytes().decode("utf-8", "replace")
    except OSError as error:
        console.say(f"{rest or '/read FILE'}: {error.strerror}", style="red")
        return
    chat.read_text += text.rstrip("\n") + "\n\n"
    console.say(f"read {rest} ({len(text)} characters): it goes before your next message")


def save(chat: Chat, rest: str) -> None:
    """/save FILE: one line of JSON."""
    from powerinfer_tools.files import atomic_write, canonical_json

    if not rest:
        console.say("/save FILE: expected a file's name")
        return
    path = Path(rest).expanduser()
    with atomic_write(path) as file:
        file.write(canonical_json({"messages": chat.conversation()}).encode("utf-8", "replace") + b"\n")
    console.wrote(path)


def show_conversation(chat: Chat, rest: str) -> None:
    """/show."""
    for message in chat.conversation():
        console.say(f"[{message['role']}] {message['content']}")


def show_stats(chat: Chat, rest: str) -> None:
    """/stats."""
    engine = chat.assistant.engine
    kv, scratch = engine.memory()
    if chat.last is not None:
        console.say(console.timings(chat.last))
    console.say(
        f"context {engine.position} of {engine.ctx_size} tokens; weights {console.size(engine.info.weight_bytes)}, "
        f"KV cache {console.size(kv)}, scratch {console.size(scratch)}; {engine.threads} threads"
    )


def leave(chat: Chat, rest: str) -> None:
    """/bye."""
    chat.done = True


COMMANDS: dict[str, Callable[[Chat, str], None]] = {
    "help": show_help,
    "?": show_help,
    "clear": clear,
    "regen": regenerate,
    "set": set_value,
    "system": set_system,
    "read": read_file,
    "save": save,
    "show": show_conversation,
    "stats": show_stats,
    "bye": leave,
    "exit": leave,
    "quit": leave,
}
