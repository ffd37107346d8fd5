"""The artifact: one GGUF file with sorted neurons, predictors, tokenizer and where it all came from.

`split` writes it, `open_artifact` reads its header and checks every name and shape, `verify` reads every byte.
"""

from powerinfer_tools.artifact.read import Artifact, open_artifact, verify
from powerinfer_tools.artifact.split import split

__all__ = ["Artifact", "open_artifact", "split", "verify"]
