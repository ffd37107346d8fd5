"""Picks the chats that training held out of those that the model wrote itself; measure.py scores them.

python examples/default-model/heldout_chats.py sparse.chats.jsonl examples/default-model/heldout-chats.jsonl
"""

import argparse
import json
from pathlib import Path

from powerinfer_tools.checkpoint import open_checkpoint
from powerinfer_tools.default_model import default_base
from powerinfer_tools.sparsify.documents import Document, held_out_documents, read_documents
from powerinfer_tools.sparsify.recipe import Recipe
from powerinfer_tools.tokens import Tokenizer

MOST_BYTES = 80_000


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("chats", type=Path, help="all of them, as powerinfer sparsify wrote or read them")
    arguments.add_argument("output", type=Path)
    args = arguments.parse_args()
    base = open_checkpoint(default_base())
    tokenizer = Tokenizer(base.tokenizer_json, base.special)
    chats = held_out_documents(read_documents(args.chats), tokenizer, base.chat_template, Recipe().window)
    args.output.write_text(lines(chats), encoding="utf-8")
    print(f"{args.output}: {args.output.stat().st_size} bytes")


def lines(chats: list[Document]) -> str:
    """A JSON line a chat, as many as MOST_BYTES hold."""
    text = ""
    for chat in chats:
        line = json.dumps({"messages": chat}, ensure_ascii=False) + "\n"
        if len((text + line).encode()) > MOST_BYTES:
            break
        text += line
    return text


if __name__ == "__main__":
    main()
