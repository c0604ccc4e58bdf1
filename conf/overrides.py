"""Quote command-line words for Hydra, so that paths and names are read as text.

Hydra reads `2024_01` as the number 202401, and rejects `写真`, `a=b` or `Photos (1)` unless they are quoted both for
Hydra and for the shell. If the schema says that a value is text, it is quoted for Hydra here.
"""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Sequence
from dataclasses import is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

_LIST = re.compile(r"\[[^\[\]{}'\"\\$]*\]")  # one list, without quotes, nesting and interpolation
_SCALAR = re.compile(r"[^\[\](){}'\"\\$,]+")  # no quotes, call, list or sweep
_SAFE = re.compile(r"[\w./:@+-]+", re.ASCII)
_FLAGS = ("--multirun", "-m", "--run", "-r", "--resolve")


def prepare_overrides(words: Sequence[str], schema: type) -> list[str]:
    """Move Hydra's switches to the front of the command line, and quote values that are text in `schema`."""
    flags = [word for word in words if word in _FLAGS]
    return flags + [quote_text(word, schema) for word in words if word not in _FLAGS]


def quote_text(word: str, schema: type) -> str:
    """Quote the value of a `key=value` so that it is read literally, if its key holds text or a list of texts."""
    key, equals, value = word.partition("=")
    if not equals or not value:
        return word
    match kinds(schema).get(key.lstrip("+")):
        case "list" if _LIST.fullmatch(value):
            parts = [part.strip() for part in value[1:-1].split(",")]
            return f"{key}=[{','.join(map(quote, parts))}]" if any(parts) else word
        case "text" if _SCALAR.fullmatch(value) and value != "null" and not _is_text(word):
            return f"{key}={quote(value)}"
    return word


def quote(value: str) -> str:
    """Quote `value`, if necessary, so that Hydra reads it back unchanged."""
    if _SAFE.fullmatch(value) and _is_text(f"x={value}"):
        return value
    escaped = re.sub(r"(\\*)'", r"\1\1\'", value)
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped)
    return "'" + escaped.replace("${", "\\${") + "'"


@functools.cache
def kinds(schema: type, prefix: str = "") -> dict[str, str]:
    """Find the keys of a schema that hold text or a list of texts."""
    types_by_key: dict[str, str] = {}
    for name, hint in get_type_hints(schema).items():
        options = set(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else {hint}
        if is_dataclass(hint) and isinstance(hint, type):
            types_by_key |= kinds(hint, f"{prefix}{name}.")
        elif options <= {str, types.NoneType}:
            types_by_key[prefix + name] = "text"
        elif hint == list[str]:
            types_by_key[prefix + name] = "list"
    return types_by_key


def _is_text(word: str) -> bool:
    """Return whether Hydra's grammar reads the value of a word as text."""
    try:
        value: Any = _parser().parse_override(word).value()
    except HydraException:
        return False
    return isinstance(value, str)


@functools.cache
def _parser() -> OverridesParser:
    return OverridesParser.create()
