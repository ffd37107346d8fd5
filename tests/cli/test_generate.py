"""`powerinfer generate`: where prompts come from, what is printed, batches."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from powerinfer_tools.tokens import Tokenizer
from tests.cli.conftest import INTERRUPT, FakeEngine, Result

Program = Callable[..., Result]
Model = Callable[..., FakeEngine]

ASKED = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def test_a_prompt_is_asked_in_the_template(powerinfer: Program, model: Model) -> None:
    engine = model("Rhine, Rhône, Po.")
    result = powerinfer("generate", "m.gguf", "-p", "Name three rivers.")
    assert result == Result(0, "Rhine, Rhône, Po.\n", "")
    assert engine.prompts == [ASKED.format("Name three rivers.")]
    assert engine.closed


def test_raw_continues_the_text(powerinfer: Program, model: Model) -> None:
    engine = model(" a time", " time")
    assert powerinfer("generate", "m.gguf", "--raw", "-p", "Once upon").out == " a time\n"
    model_without = model(" time", template=None)
    assert powerinfer("generate", "m.gguf", "-p", "Once upon a").out == " time\n"
    assert engine.prompts == ["Once upon"]
    assert model_without.prompts == ["Once upon a"]


def test_without_a_template_on_demand(powerinfer: Program, model: Model) -> None:
    engine = model(" Hello.\nUser: and")
    result = powerinfer("generate", "m.gguf", "--no-chat-template", "-p", "Hi", "--system", "Be brief.")
    assert result.out == " Hello.\n"
    assert engine.prompts == ["Be brief.\nUser: Hi\nAssistant:"]


def test_a_template_of_ones_own(powerinfer: Program, model: Model, tmp_path: Path) -> None:
    engine = model("yes")
    (tmp_path / "t.jinja").write_text("Q: {{ messages[-1].content }} A:")
    assert powerinfer("generate", "m.gguf", "-p", "Hi", "--chat-template", "t.jinja").code == 0
    assert engine.prompts == ["Q: Hi A:"]
    (tmp_path / "t.jinja").write_text("{{ 'a' * 10 ** 10 }}")
    result = powerinfer("generate", "m.gguf", "-p", "Hi", "--chat-template", "t.jinja")
    assert result.code == 1
    assert "chat template was refused" in result.err


def test_files_and_stdin(powerinfer: Program, model: Model, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("from a file")
    for how, text in (
        (["-f", "p.txt"], "from a file"),
        (["-f", "-"], "from stdin"),
        (["-p", "-"], "from stdin"),
        ([], "from stdin"),
    ):
        engine = model("ok")
        assert powerinfer("generate", "m.gguf", *how, stdin="from stdin\n").out == "ok\n"
        assert engine.prompts == [ASKED.format(text)]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-p", "a", "-f", "b"], "one of -p, -f and --batch"),
        (["-p", "a", "-o", "b"], "-o goes with --batch"),
        (["-f", "missing"], "missing: No such file"),
        ([], "expected a prompt on stdin"),
        (["-p", "x" * 400], "expected fewer than the context of 200"),
        (["--batch", "missing"], "missing: No such file"),
    ],
)
def test_usage(powerinfer: Program, model: Model, args: list[str], message: str) -> None:
    model("never")
    result = powerinfer("generate", "m.gguf", *args)
    assert (result.code, result.out) == (2, "")
    assert message in result.err


def test_json(powerinfer: Program, model: Model, tokenizer: Tokenizer) -> None:
    engine = model("Hi 🙂")
    result = powerinfer("generate", "m.gguf", "-p", "Hello", "--json")
    document = json.loads(result.out)
    assert list(document) == ["text", "tokens", "prompt_tokens", "finish_reason", "timings", "active_ratio"]
    assert list(document["timings"]) == ["prefill_s", "decode_s", "first_token_s"]
    assert document["text"] == "Hi 🙂"
    assert tokenizer.decode(document["tokens"]) == "Hi 🙂"
    assert document["prompt_tokens"] == tokenizer.encode(engine.prompts[0], add_bos=False, parse_special=True)
    assert document["finish_reason"] == "stop"
    assert document["active_ratio"] == 0.25


def test_length_and_sampling_flags(powerinfer: Program, model: Model) -> None:
    engine = model("one two three four five")
    flags = ["-n", "2", "--temp", "0.5", "--top-k", "7", "--top-p", "0.5", "--min-p", "0.1", "-s", "11"]
    flags += ["--repeat-penalty", "1.1", "--repeat-last-n", "5"]
    document = json.loads(powerinfer("generate", "m.gguf", "-p", "Count", "--json", *flags).out)
    assert document["finish_reason"] == "length"
    assert len(document["tokens"]) == 2
    assert (engine.last_seed, vars(engine.last_sampling)) == (
        11,
        {
            "temperature": 0.5,
            "top_k": 7,
            "top_p": 0.5,
            "min_p": 0.1,
            "repeat_penalty": 1.1,
            "repeat_last_n": 5,
        },
    )


def test_the_end_of_the_context_is_length(powerinfer: Program, model: Model) -> None:
    model("a b c d e f g h i j k l m n o p q r s t u v w x y z", ctx_size=40)
    document = json.loads(powerinfer("generate", "m.gguf", "-p", "Hi", "--json").out)
    assert document["finish_reason"] == "length"


def test_stop_texts_span_tokens(powerinfer: Program, model: Model) -> None:
    for stop in ("</answer>", "wer>"):
        model("42</answer> and more")
        document = json.loads(
            powerinfer("generate", "m.gguf", "-p", "Hi", "--json", "--stop", "zzz", "--stop", stop).out
        )
        assert document["text"] == "42</answer>"[: -len(stop)]
        assert document["finish_reason"] == "stop"


def test_verbose_tells_timings_on_stderr(powerinfer: Program, model: Model) -> None:
    model("fine")
    result = powerinfer("generate", "m.gguf", "-p", "Hi", "-v")
    assert result.out == "fine\n"
    assert "seed " in result.err
    assert "active neurons 25.0 %; ended by stop" in result.err


def test_ctrl_c_keeps_what_was_written(powerinfer: Program, model: Model) -> None:
    engine = model(f"one{INTERRUPT}two")
    result = powerinfer("generate", "m.gguf", "-p", "Hi")
    assert result.code == 130
    assert result.out.startswith("one")
    assert "two" not in result.out
    assert "Traceback" not in result.err
    assert engine.closed


def test_batch(powerinfer: Program, model: Model, tmp_path: Path) -> None:
    requests = [
        {"id": "a", "prompt": "first"},
        {"prompt": "second", "system": "Be brief.", "temperature": 0, "max_tokens": 1, "seed": 3},
        {"id": 7, "messages": [{"role": "user", "content": "third"}], "stop": "STOP"},
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, requests)) + "\n\n")
    engine = model("one", "two", "three STOP four")
    result = powerinfer("generate", "m.gguf", "--batch", "in.jsonl", "-o", "out.jsonl", "-q")
    assert result == Result(0, "", "")
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [r.get("id") for r in records] == ["a", None, 7]
    assert [r["text"] for r in records][::2] == ["one", "three "]
    assert [r["finish_reason"] for r in records] == ["stop", "length", "stop"]
    assert engine.prompts[1] == "<|im_start|>system\nBe brief.<|im_end|>\n" + ASKED.format("second")


def test_batch_to_stdout_from_stdin(powerinfer: Program, model: Model) -> None:
    model("one", "two")
    result = powerinfer("generate", "m.gguf", "--batch", "-", stdin='{"prompt": "a"}\n{"prompt": "b"}\n')
    assert [json.loads(line)["text"] for line in result.out.splitlines()] == ["one", "two"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "expected a JSON object"),
        ("[1]", "expected a JSON object, found list"),
        ("{}", 'expected one of "prompt" and "messages"'),
        ('{"prompt": "a", "messages": []}', 'expected one of "prompt" and "messages"'),
        ('{"prompt": 3}', "prompt: expected a text, found int"),
        ('{"prompt": ""}', "prompt: expected"),
        ('{"prompt": null}', "prompt: expected a text"),
        ('{"prompt": "a", "system": [1]}', "system: expected a text"),
        ('{"prompt": "a", "temperature": "hot"}', "temperature: expected a number in 0 .. 100, found 'hot'"),
        ('{"prompt": "a", "temperature": NaN}', "temperature: expected a number"),
        ('{"prompt": "a", "temperature": true}', "temperature: expected a number"),
        ('{"prompt": "a", "max_tokens": -5}', "max_tokens: expected an integer of 1 or more"),
        ('{"prompt": "a", "seed": 1.5}', "seed: expected an integer"),
        ('{"prompt": "a", "stop": [1]}', "stop: expected a text or a list of texts"),
        ('{"prompt": "a", "tempreature": 1}', "tempreature: expected one of"),
        ('{"messages": [{"role": "user"}]}', "messages[0].content"),
        ('{"prompt": "' + "x" * 400 + '"}', "expected fewer than the context"),
    ],
)
def test_a_bad_line_becomes_an_error_in_its_place(powerinfer: Program, model: Model, line: str, message: str) -> None:
    model("one", "two")
    stdin = '{"id": 1, "prompt": "a"}\n' + line + '\n{"id": 3, "prompt": "c"}\n'
    result = powerinfer("generate", "m.gguf", "--batch", "-", stdin=stdin)
    first, bad, last = map(json.loads, result.out.splitlines())
    assert (first["id"], first["text"], last["id"], last["text"]) == (1, "one", 3, "two")
    assert set(bad) == {"error"}
    assert bad["error"]["message"].startswith("request 2: ")
    assert message in bad["error"]["message"]
    assert result.code == 1


def test_an_interrupted_batch_leaves_no_file(powerinfer: Program, model: Model, tmp_path: Path) -> None:
    model("one", f"two{INTERRUPT}three")
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    assert powerinfer("generate", "m.gguf", "--batch", "in.jsonl", "-o", "out.jsonl").code == 130
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_batch_replaces_nothing_unasked(powerinfer: Program, model: Model, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "out.jsonl").write_text("old")
    model("one")
    assert powerinfer("generate", "m.gguf", "--batch", "in.jsonl", "-o", "out.jsonl").code == 2
    assert (tmp_path / "out.jsonl").read_text() == "old"
    assert powerinfer("generate", "m.gguf", "--batch", "in.jsonl", "-o", "out.jsonl", "--force").code == 0
    assert json.loads((tmp_path / "out.jsonl").read_text())["text"] == "one"


def test_the_default_model_says_how_to_get_it(powerinfer: Program) -> None:
    result = powerinfer("generate", "-p", "Hi")
    assert result.code == 2
    assert "make demo" in result.err


def test_the_model_may_come_from_the_environment(
    powerinfer: Program, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POWERINFER_MODEL", "m.gguf")
    model("fine")
    assert powerinfer("generate", "-p", "Hi").out == "fine\n"


def test_timings_are_llama_cpps_lines(powerinfer: Program, model: Model) -> None:
    engine = model("fine")
    result = powerinfer("generate", "m.gguf", "-p", "Hi", "--timings", "-q")
    assert result.out == "fine\n"
    said = len(engine.tokenizer.encode("fine", add_bos=False, parse_special=False))
    ms, each = r"[ \d]{7}\.\d\d ms", r"\([ \d]{5,}\.\d\d ms per token, [ \d]{5,}\.\d\d tokens per second\)"
    assert re.fullmatch(
        "\n"
        rf"llama_print_timings:        load time = {ms}\n"
        rf"llama_print_timings:      sample time = {ms} / {said + 1:5} runs   {each}\n"
        rf"llama_print_timings: prompt eval time = {ms} / {engine.position - said:5} tokens {each}\n"
        rf"llama_print_timings:        eval time = {ms} / {said:5} runs   {each}\n"
        rf"llama_print_timings:       total time = {ms}\n",
        result.err,
    )


def test_timings_come_after_an_interruption_too(powerinfer: Program, model: Model) -> None:
    model(f"one{INTERRUPT}two")
    result = powerinfer("generate", "m.gguf", "-p", "Hi", "--timings")
    assert result.code == 130
    assert result.err.count("llama_print_timings: ") == 5


def test_timings_of_a_batch_are_of_all_requests(powerinfer: Program, model: Model) -> None:
    model("one", "two")
    requests = '{"prompt": "a", "max_tokens": 1}\n{"prompt": "b", "max_tokens": 1}\n'
    result = powerinfer("generate", "m.gguf", "--batch", "-", "--timings", stdin=requests)
    assert re.search(r"sample time = .* ms /     2 runs", result.err)
    assert re.search(r" eval time = .* ms /     0 runs   \(    0.00 ms per token,     0.00 tokens", result.err)
