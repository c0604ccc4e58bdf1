"""List configuration keys with their values and meanings, from the docstrings under the fields of the schemas."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import textwrap
from collections.abc import Collection, Iterator
from functools import cache
from itertools import pairwise
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf

WIDTH = 118
_COLUMN = 44
"""Characters of `key=value` before its meaning starts on the same line."""
RESOLVER = "anther_keys"
"""Interpolated by the help templates: `${anther_keys:module:class}`, or followed by the names of the groups to list."""


@cache
def field_docs(schema: type) -> dict[str, str]:
    """Return the docstring under each field of a dataclass and its bases, in one line."""
    docs: dict[str, str] = {}
    for base in reversed(schema.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = _classes(base.__module__)[base.__name__].body
        for field, text in pairwise(body):
            documented = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
            if documented and isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                docs[field.target.id] = " ".join(str(text.value.value).split())  # type: ignore[attr-defined]
    return docs


@cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    tree = ast.parse(inspect.getsource(importlib.import_module(module)))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def key_help(schema: type, values: Any = None, only: Collection[str] = ()) -> str:
    """List the keys of a schema by group, with their values and meanings.

    Args:
        schema: dataclass of the configuration.
        values: composed configuration whose values are shown; None: the defaults of the schema.
        only: top-level keys and groups to list; empty: all.
    """
    values = OmegaConf.structured(schema) if values is None else values
    return "\n".join(_group(schema, values, "", only))


def _group(schema: type, values: Any, prefix: str, only: Collection[str] = ()) -> Iterator[str]:
    """List the keys of a group, then its subgroups."""
    hints, docs, groups = get_type_hints(schema), field_docs(schema), []
    if prefix:
        yield ""
        title = f"{prefix.removesuffix('.')}: {' '.join((inspect.getdoc(schema) or '').split())}"
        yield from textwrap.wrap(title, WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
    for name, hint in hints.items():
        if only and name not in only:
            continue
        value = OmegaConf.select(values, name, throw_on_missing=False) if isinstance(values, DictConfig) else None
        element = next(iter(get_args(hint)), None) if get_origin(hint) is list else None
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            groups.append((hint, value, f"{prefix}{name}."))
            continue
        if dataclasses.is_dataclass(element) and isinstance(element, type):
            groups.append((element, OmegaConf.structured(element), f"{prefix}{name}[]."))
        missing = isinstance(values, DictConfig) and OmegaConf.is_missing(values, name)
        yield from _line(f"{prefix}{name}={'???' if missing else _shown(value)}", docs.get(name, ""))
    for group, value, path in groups:
        yield from _group(group, value, path)


def _line(setting: str, meaning: str) -> Iterator[str]:
    head = f"    {setting}"
    lines = textwrap.wrap(meaning, WIDTH - _COLUMN, break_long_words=False, break_on_hyphens=False) or [""]
    if len(head) >= _COLUMN:
        yield head
        head = ""
    yield f"{head:<{_COLUMN}}{lines[0]}".rstrip()
    for line in lines[1:]:
        yield " " * _COLUMN + line


def _shown(value: Any) -> str:
    """Write a value as on a command line; a missing one as ???, a list of groups as […]."""
    if OmegaConf.is_list(value):
        return "[…]" if any(OmegaConf.is_dict(part) for part in value) else f"[{','.join(map(_shown, value))}]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _resolve(module: str, name: str, *only: str, _root_: DictConfig) -> str:
    return key_help(getattr(importlib.import_module(module), name), _root_, only)


def register_resolver() -> None:
    """Let help templates interpolate the keys of their application."""
    OmegaConf.register_new_resolver(RESOLVER, _resolve, replace=True)
