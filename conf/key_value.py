"""Parse `key=value` words against a schema, for commands that are configured without Hydra."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from common.errors import AntherError


def parse_override(word: str, schema: type) -> DictConfig:
    """Parse one `key=value`.

    A value of a text key is taken literally: a folder may be called 2024_01, on, or Album #3, and nothing in it is
    interpolated. Other values are converted to the key's type in the schema; `null` is None if the type is optional.

    Raises:
        AntherError: the word is not a `key=value`.
    """
    key, equals, value = word.partition("=")
    if not equals or not key:
        raise AntherError(f"{word}: can't be read as key=value; quote brackets and spaces")
    if not word.isprintable():
        raise AntherError(f"{word}: contains characters that can't be printed")
    kinds = _kinds(schema, key.split("."))
    if not kinds & {str, int, float, bool}:
        try:
            return OmegaConf.from_dotlist([word])
        except YAMLError:
            raise AntherError(f"{word}: can't be read as key=value; quote brackets and spaces") from None
    nested: Any = None if value == "null" and NoneType in kinds else _escape(value)
    for part in reversed(key.split(".")):
        nested = {part: nested}
    return OmegaConf.create(nested)


def _kinds(schema: Any, path: Sequence[str]) -> set[type]:
    """Return the types that the schema allows for a key; empty for an unknown key."""
    for part in path:
        if not dataclasses.is_dataclass(schema):
            return set()
        schema = get_type_hints(schema).get(part)
    return set(get_args(schema)) if get_origin(schema) in (UnionType, Union) else {schema}


def _escape(value: str) -> str:
    """Escape a value so that OmegaConf resolves the result to exactly this value."""
    return re.sub(r"(\\*)\$\{", lambda match: f"{match[1] * 2}\\${{", value)
