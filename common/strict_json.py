"""Frozen dataclasses of plain values as JSON, and back, strictly.

Field by field: str, bool, int, float, `T | None`, dict[str, T], tuple[T, ...], nested dataclasses, and bytes, which
JSON has not: they are put in beside it. Nothing is coerced except an integer where a float is expected, so what comes
back is what the type promises.
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
    """JSON of plain values and dataclasses of them: the same text for equal values; ValueError if not finite."""
    return _encoder.encode(value)


def loads(text: str | bytes) -> Any:
    """Parse JSON that states each key once and knows no NaN; ValueError with one line otherwise."""
    try:
        return _decoder.decode(text if isinstance(text, str) else text.decode())
    except RecursionError:
        raise ValueError("nested too deeply") from None


def from_plain(kind: type[T], value: Any, where: str = "value") -> T:
    """`value`, as parsed from JSON, as a `kind`; ValueError names the first field that is not as its type says."""
    of_kind: Any = kind  # mypy: a type is hashable
    return _converter(of_kind)(value, where)


def _fields(value: Any) -> dict[str, Any]:
    """A dataclass as JSON sees it, a level at a time: `dataclasses.asdict` copies everything below it too."""
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


_encoder = json.JSONEncoder(default=_fields, allow_nan=False, sort_keys=True, separators=(",", ":"))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key[:100]!r} is there twice")
        found[key] = value
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


_decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)


Convert = Callable[[Any, str], Any]


@functools.cache
def _converter(kind: Any) -> Convert:
    """The function that checks and converts one value of a type."""
    if dataclasses.is_dataclass(kind):
        return _dataclass_converter(kind)
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (types.UnionType, Union):
        inner = _converter(next(part for part in parts if part is not types.NoneType))
        return lambda value, where: None if value is None else inner(value, where)
    if origin is dict:
        of_item = _converter(parts[1])
        return lambda value, where: {
            key: of_item(item, f"{where}.{_shown(key)}") for key, item in _exactly(dict, value, where).items()
        }
    if origin is tuple:
        of_entry = _converter(parts[0])
        return lambda value, where: tuple(
            of_entry(item, f"{where}[{index}]") for index, item in enumerate(_exactly(list, value, where))
        )
    if kind is float:
        return _finite
    if kind in (str, int, bool, bytes):
        return functools.partial(_exactly, kind)
    raise TypeError(f"no plain form for {kind}")


def _dataclass_converter(kind: Any) -> Convert:
    hints = get_type_hints(kind)
    converters = {field.name: _converter(hints[field.name]) for field in dataclasses.fields(kind)}

    def convert(value: Any, where: str) -> Any:
        found = _exactly(dict, value, where)
        if found.keys() != converters.keys():
            wrong = min(found.keys() ^ converters.keys())
            state = "missing" if wrong in converters else "unknown"
            raise ValueError(f"{where}.{_shown(wrong)}: {state}")
        return kind(**{name: converter(found[name], f"{where}.{name}") for name, converter in converters.items()})

    return convert


def _shown(key: str) -> str:
    """A key that a stranger wrote, for one line of a log."""
    return ascii(key[:100])[1:-1]


def _exactly(kind: type, value: Any, where: str) -> Any:
    if type(value) is not kind:  # not isinstance: a bool is an int
        raise ValueError(f"{where}: must be {kind.__name__}, is {type(value).__name__}")
    return value


def _finite(value: Any, where: str) -> float:
    if type(value) not in (int, float):
        raise ValueError(f"{where}: must be float, is {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{where}: must be finite")
    return number
