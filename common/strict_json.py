"""Strict conversion of frozen dataclasses of plain values to JSON and back.

Supported field types: str, bool, int, float, `T | None`, dict[str, T], tuple[T, ...], nested dataclasses, and bytes,
which are not part of the JSON and are added to its parsed form. Nothing is coerced except an integer to a float, so the
result has exactly the declared types.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
from collections.abc import Callable
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def dumps(value: Any) -> str:
    """Encode plain values and dataclasses of them. Equal values give equal text. ValueError for NaN and infinity."""
    return _encoder.encode(value)


def loads(text: str | bytes) -> Any:
    """Parse JSON without duplicate keys and NaN; ValueError with one line otherwise."""
    try:
        return _decoder.decode(text if isinstance(text, str) else text.decode())
    except RecursionError:
        raise ValueError("nested too deeply") from None


def from_plain(kind: type[T], value: Any, where: str = "value") -> T:
    """Convert a value that was parsed from JSON.

    Args:
        kind: target type.
        value: parsed value.
        where: name of the value, for messages.

    Raises:
        ValueError: names the first field that doesn't match its type.
    """
    of_kind: Any = kind  # mypy: a type is hashable
    return _converter(of_kind)(value, where)


def _fields(value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass without copying their values, which `dataclasses.asdict` does."""
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


_encoder = json.JSONEncoder(default=_fields, allow_nan=False, sort_keys=True, separators=(",", ":"))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique: dict[str, Any] = {}
    for key, value in pairs:
        if key in unique:
            raise ValueError(f"key {key[:100]!r} is duplicated")
        unique[key] = value
    return unique


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


_decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)


Convert = Callable[[Any, str], Any]


@functools.cache
def _converter(kind: Any) -> Convert:
    """Return the function that checks and converts values of a type."""
    if dataclasses.is_dataclass(kind):
        return _dataclass_converter(kind)
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (types.UnionType, Union):
        inner = _converter(next(part for part in parts if part is not types.NoneType))
        return lambda value, where: None if value is None else inner(value, where)
    if origin is dict:
        of_item = _converter(parts[1])
        return lambda value, where: {
            key: of_item(item, f"{where}.{_printable(key)}") for key, item in _require_type(dict, value, where).items()
        }
    if origin is tuple:
        of_entry = _converter(parts[0])
        return lambda value, where: tuple(
            of_entry(item, f"{where}[{index}]") for index, item in enumerate(_require_type(list, value, where))
        )
    if kind is float:
        return _finite_float
    if kind in (str, int, bool, bytes):
        return functools.partial(_require_type, kind)
    raise TypeError(f"no plain form for {kind}")


def _dataclass_converter(kind: Any) -> Convert:
    hints = get_type_hints(kind)
    converters = {field.name: _converter(hints[field.name]) for field in dataclasses.fields(kind)}

    def convert(value: Any, where: str) -> Any:
        fields = _require_type(dict, value, where)
        if fields.keys() != converters.keys():
            wrong = min(fields.keys() ^ converters.keys())
            state = "missing" if wrong in converters else "unknown"
            raise ValueError(f"{where}.{_printable(wrong)}: {state}")
        return kind(**{name: converter(fields[name], f"{where}.{name}") for name, converter in converters.items()})

    return convert


def _printable(key: str) -> str:
    """Return an untrusted key in a printable form, for one line of a log."""
    return ascii(key[:100])[1:-1]


def _require_type(kind: type, value: Any, where: str) -> Any:
    if type(value) is not kind:  # not isinstance: a bool is an int
        raise ValueError(f"{where}: must be {kind.__name__}, is {type(value).__name__}")
    return value


def _finite_float(value: Any, where: str) -> float:
    if type(value) not in (int, float):
        raise ValueError(f"{where}: must be float, is {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{where}: must be finite")
    return number
