"""Greedy answers of the original and of the sparse model to prompts.jsonl, one under the other: answers.md.

python examples/default-model/answers.py original.gguf sparse.gguf
"""

import argparse
import json
from pathlib import Path
from typing import Any

from powerinfer_tools.assistant import Settings, open_assistant
from powerinfer_tools.batch import answers, read_requests
from powerinfer_tools.engine import Sampling

HERE = Path(__file__).parent
GREEDY = Settings(Sampling(temperature=0), seed=0, max_tokens=96)
FENCE = "~~~~"  # answers have backticks in them


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("original", type=Path, help="artifact of the original model")
    arguments.add_argument("sparse", type=Path, help="artifact of the sparse one")
    arguments.add_argument("--prompts", type=Path, default=HERE / "prompts.jsonl", help="requests, one a line")
    arguments.add_argument("--output", type=Path, default=HERE / "answers.md", help="the page to write")
    args = arguments.parse_args()
    requests = read_requests(args.prompts)
    original, sparse = (answers_of(path, requests) for path in (args.original, args.sparse))
    args.output.write_text(page([json.loads(line) for line in requests], original, sparse), encoding="utf-8")
    print(f"{args.output}: {len(requests)} prompts")


def answers_of(path: Path, requests: list[bytes]) -> list[dict[str, Any]]:
    with open_assistant(path, ctx_size=1024) as assistant:
        return list(answers(assistant, requests, GREEDY))


def page(requests: list[dict[str, Any]], original: list[dict[str, Any]], sparse: list[dict[str, Any]]) -> str:
    """The whole answers.md."""
    same = sum(a["tokens"] == b["tokens"] for a, b in zip(original, sparse, strict=True))
    sections = [section(*parts) for parts in zip(requests, original, sparse, strict=True)]
    introduction = (
        "# Answers, side by side\n\n"
        f"Greedy answers, {GREEDY.max_tokens} tokens at most, of the original model and of the sparse one, each as "
        "`powerinfer build` makes it by default. Written by `answers.py`; nothing was chosen or left out. "
        f"{same} of {len(requests)} answers are the same token for token.\n"
    )
    return "\n".join([introduction, *sections])


def section(request: dict[str, Any], original: dict[str, Any], sparse: dict[str, Any]) -> str:
    """One prompt and its answers."""
    messages = request.get("messages") or [{"role": "user", "content": request["prompt"]}]
    asked = "\n>\n".join(f"> {message['role']}: {message['content']}" for message in messages)
    n = shared(original["tokens"], sparse["tokens"])
    agreement = "The same answer." if original["tokens"] == sparse["tokens"] else f"The first {n} tokens are the same."
    shown = [f"{name}:\n\n{fenced(answer)}" for name, answer in (("original", original), ("sparse", sparse))]
    return "\n\n".join([f"## {request['id']}", asked, *shown, agreement]) + "\n"


def shared(one: list[int], other: list[int]) -> int:
    """Tokens before the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def fenced(answer: dict[str, Any]) -> str:
    cut = " …" if answer["finish_reason"] == "length" else ""
    return f"{FENCE}\n{answer['text'].strip()}{cut}\n{FENCE}"


if __name__ == "__main__":
    main()
