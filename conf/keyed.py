"""A `key=value` that a person wrote for a schema, of what is composed without Hydra."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from conf.errors import AntherError


def keyed(word: str, schema: type) -> DictConfig:
    """One key with its value, of what is composed without Hydra.

    What a person writes for a text is that text, to the letter: a folder may be called 2024_01, on, or Album #3, and
    nothing in it is looked up. Other values are converted to the type that the schema has for the key; `null` is none
    where it allows none.

    Raises:
        AntherError: it is no key with a value.
    """
    key, equals, value = word.partition("=")
    if not equals or not key:
        raise AntherError(f"{word}: can't be read as key=value; quote brackets and spaces")
    if not word.isprintable():
        raise AntherError(f"{word}: holds characters that can't be printed")
    kinds = _kinds(schema, key.split("."))
    if not kinds & {str, int, float, bool}:
        try:
            return OmegaConf.from_dotlist([word])
        except YAMLError:
            raise AntherError(f"{word}: can't be read as key=value; quote brackets and spaces") from None
    found: Any = None if value == "null" and NoneType in kinds else _escaped(value)
    for part in reversed(key.split(".")):
        found = {part: found}
    return OmegaConf.create(found)


def _kinds(schema: Any, path: Sequence[str]) -> set[type]:
    """The types that the schema allows for a key; none for a key that it hasn't."""
    for part in path:
        if not dataclasses.is_dataclass(schema):
            return set()
        schema = get_type_hints(schema).get(part)
    return set(get_args(schema)) if get_origin(schema) in (UnionType, Union) else {schema}


def _escaped(value: str) -> str:
    """A text that OmegaConf resolves to this value, whatever is in it."""
    return re.sub(r"(\\*)\$\{", lambda found: f"{found[1] * 2}\\${{", value)
