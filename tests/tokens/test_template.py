"""Chat templates: what they may do, and that the worst of them cost an error and nothing else."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from powerinfer_tools.errors import PowerinferError
from powerinfer_tools.tokens import render_chat, template_child
from powerinfer_tools.tokens.template import TEMPLATE

HELLO = [{"role": "user", "content": "Hello"}]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def render(template: str, messages: list[dict[str, str]] = HELLO) -> str:
    return render_chat(template, messages, TOKENS, add_generation_prompt=True)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}", "<s>Hello</s>"),
        ("{% if add_generation_prompt %}go{% endif %}", "go"),
        ("  {% for m in messages %}\n  {{ m.role }}\n  {% endfor %}\n", "  user\n"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{{ {'a': '<é>'} | tojson }}", '{"a": "<é>"}'),
        ("{{ {'b': 1, 'a': [2]} | tojson(indent=1) }}", '{\n "b": 1,\n "a": [\n  2\n ]\n}'),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "Hello"),
        ("{% if tools %}tools{% endif %}{% if tools is defined %}x{% endif %}", ""),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
        ("{{ messages[0].content.split('l') | last | trim }}", "o"),
    ],
)
def test_what_published_templates_use(template: str, text: str) -> None:
    assert render(template) == text


def test_today() -> None:
    from datetime import datetime

    assert render("{{ strftime_now('%Y') }}") == str(datetime.now().year)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 2000000000 }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxxxx{% endfor %}{% endfor %}",
        "{{ '%1000000000d' % 1 }}",
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
        "{{ 'x'.center(1000000000) | length }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a %}{% endfor %}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ misspelt }}",
        "{{ misspelt.field }}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ '{0.__class__}'.format(1) }}{{ messages.append(1) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for",
        "{{ " + "(" * 5000 + ")" * 5000 + " }}",
        "a" * (1 << 20),
        "{{ 'x' * 5000000 }}",
    ],
)
def test_refused(template: str) -> None:
    before = psutil.Process().memory_info().rss
    largest_child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # of this session's other tests
    with pytest.raises(PowerinferError) as caught:
        render(template)
    message = str(caught.value)
    assert message.startswith("the model's chat template was refused: ")
    assert "--no-chat-template" in message
    assert "\n" not in message
    assert len(message) < 700
    assert psutil.Process().memory_info().rss - before < 64 << 20
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss <= max(largest_child, 512 << 10)
    assert render("still here") == "still here"


def test_the_reason_is_told() -> None:
    with pytest.raises(PowerinferError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(PowerinferError, match="'misspelt' is undefined"):
        render("{{ misspelt }}")
    with pytest.raises(PowerinferError, match=f"at most {TEMPLATE >> 10} KiB of template"):
        render("a" * (TEMPLATE + 1))


def test_a_large_conversation_is_refused_before_it_is_sent() -> None:
    with pytest.raises(PowerinferError, match="8 MiB of messages"):
        render("{{ messages }}", [{"role": "user", "content": "x" * (9 << 20)}])


def test_large_texts_pass() -> None:
    text = "東" * 500_000
    assert render("{{ messages[0].content }}", [{"role": "user", "content": text}]) == text


def test_the_child_imports_nothing_heavy() -> None:
    code = (
        f"import sys, runpy; sys.argv = ['child']; sys.path.insert(0, '.'); "
        f"runpy.run_path({template_child.__file__!r}, run_name='__main__'); "
        "print(sorted({'torch', 'numpy', 'powerinfer_tools', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], input=b"", capture_output=True, check=True)
    assert done.stdout.decode().split("\n")[:2] == ["ready", "[]"]


def test_the_child_ends_with_its_parent() -> None:
    child = subprocess.Popen([sys.executable, template_child.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.communicate(b'{"template": "{{ 1 + 1 }}", "variables": {}}\n', timeout=20)
    assert child.returncode == 0


def test_children_cannot_write_files(tmp_path: Path) -> None:
    code = (
        f"import runpy, sys; child = runpy.run_path({template_child.__file__!r}); child['limit_memory'](); "
        f"open({str(tmp_path / 'file')!r}, 'wb', 0).write(b'x')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode != 0
    assert os.path.getsize(tmp_path / "file") == 0
