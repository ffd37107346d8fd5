"""What a family's file says."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from powerinfer_tools.checkpoint.fields import Fields
from powerinfer_tools.checkpoint.gguf_config import Header
from powerinfer_tools.checkpoint.sources import Reading

Reader = Callable[[Header], Reading]


@dataclass(frozen=True)
class Pwri:
    """How a model file of the first PowerInfer is read. activation: what its engine computes; assumed: keys that its
    converter left out.
    """

    read: Reader
    activation: str
    assumed: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """name: Config.arch; models: config.json's model_type, each with the class that `architectures` names;
    folder: reads (config.json, the model's name, notes for the user); gguf: what reads a GGUF file, by its
    general.architecture; pwri: a model file of the first PowerInfer, whose general.architecture is `name`;
    quantised: folder understands quantization_config.

    For README: activations that its models have; example of one; checked: what logits were compared with.
    """

    name: str
    models: Mapping[str, str]
    folder: Callable[[Fields, str, list[str]], Reading]
    activations: tuple[str, ...]
    example: str
    checked: str
    gguf: Mapping[str, Reader] = field(default_factory=dict)
    pwri: Pwri | None = None
    quantised: bool = False
