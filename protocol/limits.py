"""Ranges of all values in messages, for any sender.

The field types would admit a count of 10⁴⁰⁰⁰, which no float represents, a name of a megabyte, and names with a line
feed or an unpaired surrogate, which forge a line of a log or can't be written to a file. A device's policy limits plans
further, and the strategy limits replies further.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

MAX_COUNT = 2**31 - 1
MAX_NUMBER = 1e12
"""Sums of such numbers over all devices stay finite."""
MAX_TEXT = 200  # characters
MAX_TIMESTEPS = 1000  # length of a schedule; a device's own limit is in its policy
MAX_ENTRIES = 20_000  # more than the number of layers of any base

_SIGNED = {"gain"}  # all other numbers are nonnegative
_FRACTIONS = {"battery"}  # at most 1
_CHOICES = {
    "optimiser": ("adamw", "sgd"),
    "precision": ("fp16", "int8", "int4"),
    "quality": ("measured", "estimate"),
    "trains": ("both", "a", "b", "cores", "split"),
    "update": ("fp32", "fp16", "int8", "int4"),
}


def check(message: Any) -> None:
    """Raise ValueError, naming the field, if a value of a message or of a nested dataclass is out of range."""
    _check(message, type(message).__name__, "")


def _check(value: Any, where: str, name: str) -> None:
    """Check a value that is, or is nested in, the field of this name."""
    kind: Any = type(value)  # mypy: a type is hashable
    if names := _fields(kind):
        for field in names:
            _check(getattr(value, field), f"{where}.{field}", field)
    elif isinstance(value, dict):
        for index, (key, item) in enumerate(value.items()):
            _check(key, f"{where}, key {index}", name)
            _check(item, f"{where}, value {index}", name)
    elif isinstance(value, tuple):
        if len(value) > MAX_ENTRIES:
            raise ValueError(f"{where}: {len(value)} entries, the maximum is {MAX_ENTRIES}")
        for index, item in enumerate(value):
            _check(item, f"{where}[{index}]", name)
    elif problem := _problem(name, value):
        raise ValueError(f"{where}: {problem}")


@cache
def _fields(kind: Any) -> tuple[str, ...]:
    """Return the names of a dataclass's fields; empty for any other type."""
    return tuple(field.name for field in dataclasses.fields(kind)) if dataclasses.is_dataclass(kind) else ()


def _problem(name: str, value: Any) -> str | None:
    """Return the problem with one plain value, or None. Bytes are checked by `protocol.tensor_codec`."""
    match value:
        case bool():
            return None
        case int() if name == "timesteps":
            return None if 1 <= value <= MAX_TIMESTEPS else f"must be 1 to {MAX_TIMESTEPS}"
        case int():
            return None if 0 <= value <= MAX_COUNT else f"must be 0 to {MAX_COUNT}"
        case float():
            minimum = -MAX_NUMBER if name in _SIGNED else 0.0
            maximum = 1.0 if name in _FRACTIONS else MAX_NUMBER
            return None if minimum <= value <= maximum else f"must be {minimum:g} to {maximum:g}"
        case str() if name in _CHOICES:
            return None if value in _CHOICES[name] else f"must be one of {', '.join(_CHOICES[name])}"
        case str():
            fits = len(value) <= MAX_TEXT and value.isprintable()
            return None if fits else f"must be at most {MAX_TEXT} printable characters"
    return None
