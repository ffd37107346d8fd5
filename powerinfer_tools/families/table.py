"""README's table of families, written from their files: python -m powerinfer_tools.families.table README.md"""

import sys
from pathlib import Path

from powerinfer_tools.families.family import Family
from powerinfer_tools.families.registry import all_families

HEAD = "| family | checkpoint | activations | for example | logits checked against |\n|---|---|---|---|---|\n"


def table() -> str:
    """One line a family."""
    return HEAD + "".join(_line(family) for family in all_families())


def with_table(page: str) -> str:
    """The page with its table of families made anew. Errors: the page has none."""
    before, found, after = page.partition(HEAD)
    if not found:
        raise ValueError(f"expected the line {HEAD.splitlines()[0]}")
    return before + table() + after[after.index("\n\n") + 1 :]


def _line(family: Family) -> str:
    kin = sorted(family.models.keys() - {family.name})
    name = f"{family.name} (also {', '.join(kin)})" if kin else family.name
    kinds = {"folder": True, "GGUF": family.gguf, "PWRI": family.pwri}
    checkpoint = ", ".join(kind for kind, reads in kinds.items() if reads)
    return f"| {name} | {checkpoint} | {', '.join(family.activations)} | {family.example} | {family.checked} |\n"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(with_table(path.read_text()))
