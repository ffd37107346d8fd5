"""All families, found by their files."""

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from powerinfer_tools import families
from powerinfer_tools.families.family import Family, Pwri, Reader


@cache
def all_families() -> tuple[Family, ...]:
    """Every FAMILY of this folder's files, in order of their names."""
    modules = [import_module(f"{families.__name__}.{module.name}") for module in iter_modules(families.__path__)]
    return tuple(module.FAMILY for module in modules if hasattr(module, "FAMILY"))


def by_model_type() -> dict[str, Family]:
    """model_type of a config.json -> its family."""
    return {kind: family for family in all_families() for kind in family.models}


def by_architecture() -> dict[str, Reader]:
    """general.architecture of a GGUF file -> what reads it."""
    return {name: reader for family in all_families() for name, reader in family.gguf.items()}


def by_pwri_architecture() -> dict[str, Pwri]:
    """general.architecture of a model file of the first PowerInfer -> how it is read."""
    return {family.name: family.pwri for family in all_families() if family.pwri is not None}
