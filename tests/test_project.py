"""What the project's own pages promise is there."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
TARGETS = "help setup native check test demo bench families fuzz asan tsan cuda gpu-check clean".split()


def test_make_lists_its_targets() -> None:
    done = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert [line.split()[1] for line in done.stdout.splitlines()] == TARGETS


def test_every_link_of_a_page_leads_somewhere() -> None:
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text())]
    assert len(links) > 2
    assert [(str(page), link) for page, link in links if not (page.parent / link).exists()] == []


def test_make_targets_that_the_readme_names_exist() -> None:
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE))
    assert "demo" in named
    assert named <= set(TARGETS)
