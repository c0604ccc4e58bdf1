"""What the values of a message may be at all, whoever sends it.

Types alone let a count of 10⁴⁰⁰⁰ through, which no float holds, a name of a megabyte, and one with a line feed or half
a surrogate pair, which forges a line of a log or can't be written to a file. What a plan may ask of a device is not
decided here but by its policy, and what a reply must say by the strategy.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

MOST_COUNT = 2**31 - 1
MOST_NUMBER = 1e12
"""Sums of as many numbers as there are devices stay finite."""
MOST_TEXT = 200  # characters
MOST_TIMESTEPS = 1000  # as many as a schedule has; how many a device takes is its policy's to say
MOST_ENTRIES = 20_000  # more than any base has layers

_SIGNED = {"gain"}  # every other number is an amount
_SHARES = {"battery"}  # of a whole
_WORDS = {
    "optimiser": ("adamw", "sgd"),
    "precision": ("fp16", "int8", "int4"),
    "quality": ("measured", "estimate"),
    "trains": ("both", "a", "b", "cores", "split"),
    "update": ("fp32", "fp16", "int8", "int4"),
}


def check(message: Any) -> None:
    """ValueError, naming the field, for a value of a message, or of a dataclass within it, that no honest one holds."""
    _check(message, type(message).__name__, "")


def _check(value: Any, where: str, name: str) -> None:
    """The same for a value that is, or is within, the field of this name."""
    kind: Any = type(value)  # mypy: a type is hashable
    if names := _fields(kind):
        for field in names:
            _check(getattr(value, field), f"{where}.{field}", field)
    elif isinstance(value, dict):
        for index, (key, item) in enumerate(value.items()):
            _check(key, f"{where}, key {index}", name)
            _check(item, f"{where}, value {index}", name)
    elif isinstance(value, tuple):
        if len(value) > MOST_ENTRIES:
            raise ValueError(f"{where}: {len(value)} entries, where {MOST_ENTRIES} are the most")
        for index, item in enumerate(value):
            _check(item, f"{where}[{index}]", name)
    elif complaint := _complaint(name, value):
        raise ValueError(f"{where}: {complaint}")


@cache
def _fields(kind: Any) -> tuple[str, ...]:
    """Names of a dataclass' fields; none of any other type."""
    return tuple(field.name for field in dataclasses.fields(kind)) if dataclasses.is_dataclass(kind) else ()


def _complaint(name: str, value: Any) -> str | None:
    """What is wrong with one plain value; bytes are for `protocol.tensor_codec`."""
    match value:
        case bool():
            return None
        case int() if name == "timesteps":
            return None if 1 <= value <= MOST_TIMESTEPS else f"must be 1 to {MOST_TIMESTEPS}"
        case int():
            return None if 0 <= value <= MOST_COUNT else f"must be 0 to {MOST_COUNT}"
        case float():
            least = -MOST_NUMBER if name in _SIGNED else 0.0
            most = 1.0 if name in _SHARES else MOST_NUMBER
            return None if least <= value <= most else f"must be {least:g} to {most:g}"
        case str() if name in _WORDS:
            return None if value in _WORDS[name] else f"must be one of {', '.join(_WORDS[name])}"
        case str():
            fits = len(value) <= MOST_TEXT and value.isprintable()
            return None if fits else f"must be {MOST_TEXT} printable characters at most"
    return None
