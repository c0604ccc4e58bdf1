"""What the values of a message may be at all, whoever sends it.

Types alone let a count of 10⁴⁰⁰⁰ through, which no float holds, a name of a megabyte, and one with a line feed or half
a surrogate pair, which forges a line of a log or can't be written to a file. What a plan may ask of a device is not
decided here but by its policy, and what a reply must say by the strategy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

MOST_COUNT = 2**31 - 1
MOST_NUMBER = 1e12
"""Sums of as many numbers as there are devices stay finite."""
MOST_TEXT = 200  # characters

_SIGNED = {"gain"}  # every other number is an amount
_WORDS = {"quality": ("measured", "estimate")}


def check(message: Any) -> None:
    """ValueError, naming the field, for a value of a message, or of a dataclass within it, that no honest one holds."""
    for where, name, value in _values(message, type(message).__name__):
        if complaint := _complaint(name, value):
            raise ValueError(f"{where}: {complaint}")


def _values(value: Any, where: str, name: str = "") -> Iterator[tuple[str, str, Any]]:
    """(where it is, name of its field, value) of everything that holds nothing further."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _values(getattr(value, field.name), f"{where}.{field.name}", field.name)
    elif isinstance(value, dict):
        for index, (key, item) in enumerate(value.items()):
            yield f"{where}, key {index}", name, key
            yield from _values(item, f"{where}, value {index}", name)
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _values(item, f"{where}[{index}]", name)
    else:
        yield where, name, value


def _complaint(name: str, value: Any) -> str | None:
    """What is wrong with one plain value; bytes are for `protocol.codec`."""
    match value:
        case bool():
            return None
        case int():
            return None if 0 <= value <= MOST_COUNT else f"must be 0 to {MOST_COUNT}"
        case float():
            least = -MOST_NUMBER if name in _SIGNED else 0.0
            return None if least <= value <= MOST_NUMBER else f"must be {least:g} to {MOST_NUMBER:g}"
        case str() if name in _WORDS:
            return None if value in _WORDS[name] else f"must be one of {', '.join(_WORDS[name])}"
        case str():
            fits = len(value) <= MOST_TEXT and value.isprintable()
            return None if fits else f"must be {MOST_TEXT} printable characters at most"
    return None
