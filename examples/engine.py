"""The engine in ten lines: python examples/engine.py ARTIFACT "a prompt"."""

import sys
from pathlib import Path

from powerinfer_tools.artifact import open_artifact
from powerinfer_tools.engine import Engine, Sampling, generate
from powerinfer_tools.tokens import Tokenizer

path, prompt = Path(sys.argv[1]), sys.argv[2]
artifact = open_artifact(path)
tokenizer = Tokenizer(artifact.tokenizer_json, artifact.special)
text = tokenizer.stream()
ids = tokenizer.encode(prompt, add_bos=True, parse_special=False)
with Engine(path) as engine:
    for token in generate(engine, ids, Sampling(temperature=0), max_tokens=64, stop_ids=tokenizer.eos):
        print(text.push(token.id), end="", flush=True)
    print(text.flush(), f"\n{engine.stats().active_ratio:.0%} of the neurons fired", sep="")
