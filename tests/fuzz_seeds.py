"""Writes the seeds of the GGUF fuzzer into a folder: python -m tests.fuzz_seeds FOLDER"""

import sys
from pathlib import Path

from tests.gguf_bytes import every_tensor, every_value, gguf, scalar, tensor, whole


def seeds() -> dict[str, bytes]:
    tensors, data = every_tensor()
    each = {f"value_{i}": gguf([pair]) for i, pair in enumerate(every_value())}
    return {
        **each,
        "empty": gguf(),
        "whole": whole(),
        "tensors": gguf([], tensors, data),
        "aligned": gguf([scalar(b"general.alignment", 4, 64)], [tensor(b"t", (16,))], bytes(64), alignment=64),
    }


def main(folder: str) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, content in seeds().items():
        (Path(folder) / name).write_bytes(content)


if __name__ == "__main__":
    main(sys.argv[1])
