"""Flags of llama.cpp and of the first PowerInfer: the whole table, command by command."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from powerinfer_tools.cli.habits import ANSWERED, NEEDLESS, RENAMED, translated
from powerinfer_tools.cli.main import COMMANDS, _load
from powerinfer_tools.errors import PowerinferError
from tests.cli.conftest import FakeEngine, Result

Program = Callable[..., Result]
Model = Callable[..., FakeEngine]

RUNNING = ("chat", "generate", "bench")

# what the `main` of the first PowerInfer parses
THEIRS = """
-i --interactive --interactive-first -ins --instruct --multiline-input -r --reverse-prompt --color -s --seed -t
--threads -tb --threads-batch -p --prompt -e --escape --prompt-cache --prompt-cache-all --prompt-cache-ro
--random-prompt --in-prefix-bos --in-prefix --in-suffix -f --file -n --n-predict -c --ctx-size -b --batch-size --top-k
--top-p --min-p --tfs --typical --repeat-last-n --repeat-penalty --presence-penalty --frequency-penalty --mirostat
--mirostat-lr --mirostat-ent -l --logit-bias --grammar --grammar-file --cfg-negative-prompt --cfg-negative-prompt-file
--cfg-scale --rope-scaling --rope-scale --rope-freq-base --rope-freq-scale --yarn-orig-ctx --yarn-ext-factor
--yarn-attn-factor --yarn-beta-slow --yarn-beta-fast --ignore-eos --no-penalize-nl --memory-f32 --temp --vram-budget
--logits-all --hellaswag --hellaswag-tasks --keep --draft --chunks -np --parallel -ns --sequences -pa --p-accept -ps
--p-split -cb --cont-batching --mmproj --image --mlock --no-mmap --numa -ngl --n-gpu-layers -ngld --n-gpu-layers-draft
-ts --tensor-split -mg --main-gpu -nommq --no-mul-mat-q --verbose-prompt --simple-io --sparse-threshold --lora
--lora-scaled --lora-base -m --model -md --model-draft -ld --logdir --log-test --log-disable --log-enable --log-file
--log-new --log-append --reset-gpu-index --disable-gpu-index --embedding --infill --perplexity --all-logits
--ppl-stride --ppl-output-type --gpu-layers --gpu-layers-draft
""".split()


def own(command: str) -> dict[str, Any]:
    """A command's flags, and the name of its argument."""
    parameters = _load(command).params
    return {flag: p for p in parameters for flag in (p.opts if p.param_type_name == "option" else [p.metavar])}


@pytest.mark.parametrize("flag", THEIRS)
def test_every_flag_of_the_first_powerinfer_is_known(flag: str) -> None:
    ours = own("generate")
    assert flag in ours or flag in NEEDLESS or flag in ANSWERED or ours.keys() & RENAMED[flag]


@pytest.mark.parametrize("flag", RENAMED)
def test_a_renamed_flag_is_taken_where_the_command_has_it(flag: str) -> None:
    understood = 0
    for command in COMMANDS:
        target = next((name for name in RENAMED[flag] if name in own(command)), None)
        if target is None or flag in own(command):
            continue
        understood += 1
        value = "8GiB" if flag == "--vram-budget" else "8"
        expected = [value] if target.isupper() else [target, value]
        for args in ([flag, "8"], [f"{flag}=8"]):
            assert translated(args, _load(command)) == expected
    assert understood


@pytest.mark.parametrize("flag", NEEDLESS)
def test_a_needless_flag_is_dropped(flag: str) -> None:
    for command in RUNNING:
        if NEEDLESS[flag] in ("", command):
            assert translated(["x.gguf", flag, "-q"], _load(command)) == ["x.gguf", "-q"]
        else:
            assert flag in ANSWERED


@pytest.mark.parametrize("flag", ANSWERED)
def test_a_flag_without_a_meaning_is_answered_in_one_line(powerinfer: Program, flag: str) -> None:
    answered = 0
    for command in RUNNING:
        if {flag, *RENAMED.get(flag, ())} & own(command).keys() or NEEDLESS.get(flag) == command:
            continue
        answered += 1
        expected = Result(2, "", f"powerinfer: no such option: {flag}: {ANSWERED[flag]}\n")
        assert powerinfer(command, "x.gguf", flag, "1") == expected
        assert powerinfer(command, "x.gguf", f"{flag}=1") == expected
    assert answered


@pytest.mark.parametrize("answer", sorted(set(ANSWERED.values())))
def test_an_answer_names_flags_that_exist(answer: str) -> None:
    named = re.search(r"powerinfer (\w+)", answer)
    flags = {flag for command in ([named[1]] if named else RUNNING) for flag in own(command)}
    assert set(re.findall(r"(?<!\w)--?[a-z][\w-]*", answer)) <= flags
    assert ";" not in answer


def test_all_flags_are_answered_at_once(powerinfer: Program) -> None:
    result = powerinfer("generate", "x.gguf", "-ngl", "99", "--batch_size", "512", "-p", "Hi")
    assert result.code == 2
    assert result.err == (
        f"powerinfer: no such option: -ngl: {ANSWERED['-ngl']}; --batch-size: {ANSWERED['--batch-size']}\n"
    )


def test_an_old_command_line_runs(powerinfer: Program, model: Model) -> None:
    engine = model("one two User: three")
    flags = ["--temp", "0.5", "--top_k", "7", "--no-mmap", "--reset-gpu-index", "-r", "User:", "-s", "-1", "-t", "-1"]
    result = powerinfer("generate", "-m", "m.gguf", "-p", "Hi", "--n_predict", "-1", *flags)
    assert result == Result(0, "one two \n", "")
    assert (engine.last_sampling.temperature, engine.last_sampling.top_k) == (0.5, 7)


def test_values_are_no_flags(powerinfer: Program, model: Model) -> None:
    engine = model("fine", "fine")
    assert powerinfer("generate", "m.gguf", "--raw", "-p", "-ngl").out == "fine\n"
    assert powerinfer("generate", "--raw", "-p", "-i", "--", "m.gguf").out == "fine\n"
    assert engine.prompts == ["-ngl", "-i"]
    assert translated(["--", "-ngl"], _load("generate")) == ["--", "-ngl"]


def test_a_model_may_be_called_model() -> None:
    assert translated(["MODEL", "--corpus", "FILE"], _load("build")) == ["MODEL", "--corpus", "FILE"]
    assert translated(["FILE=1"], _load("inspect")) == ["FILE=1"]


def test_values_below_zero_are_left_out_where_a_flag_may_be_absent() -> None:
    assert translated(["-n", "-2", "--seed=-1"], _load("generate")) == []
    assert translated(["--seed", "-1"], _load("build")) == ["--seed", "-1"]


def test_a_flag_without_its_value_is_one_line(powerinfer: Program) -> None:
    for flag in ("-n", "--n-predict"):
        result = powerinfer("generate", "x.gguf", flag)
        assert result.code == 2
        assert "requires an argument" in result.err
        assert result.err.count("\n") == 1


def test_a_switch_takes_no_value() -> None:
    with pytest.raises(Exception, match="does not take a value"):
        _load("generate").make_context("generate", ["--json=x"])


def test_completion_raises_nothing() -> None:
    _load("generate").make_context("generate", ["-ngl", "99"], resilient_parsing=True)
    with pytest.raises(PowerinferError):
        _load("generate").make_context("generate", ["-ngl", "99"])
