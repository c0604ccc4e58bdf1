"""List configuration keys with their values and meanings.

These are the docstrings under the fields of the schemas, and for components the comments of their YAML files.
"""

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

import yaml
from omegaconf import DictConfig, OmegaConf

from conf.components import GROUPS, NAMED, ROBUST
from conf.explain import known_keys
from conf.groups import CONF, PLUG_IN, GroupOption, choices, group_options
from conf.plugin_options import installed_plugins, plugin_key
from conf.renames import settings_of

WIDTH = 118
_COLUMN = 44
"""Characters of `key=value` before its meaning starts on the same line."""
KEYS, GROUP_NAMES = "anther_keys", "anther_groups"
"""Interpolated by the help templates: `${anther_keys:module,class}`, or followed by the names of the groups to list;
and `${anther_groups:configuration,module,class}`."""


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
    hints, docs = get_type_hints(schema), field_docs(schema)
    groups: list[Iterator[str]] = []
    if prefix:
        yield from _title(prefix.removesuffix("."), " ".join((inspect.getdoc(schema) or "").split()))
    for name, hint in hints.items():
        if only and name not in only:
            continue
        value = OmegaConf.select(values, name, throw_on_missing=False) if isinstance(values, DictConfig) else None
        element = next(iter(get_args(hint)), None) if get_origin(hint) is list else None
        if not prefix and name in (*GROUPS, ROBUST):
            groups.append(_components(name, docs[name], value if OmegaConf.is_dict(value) else {}))
            continue
        if name == "name" and prefix.removesuffix(".") in NAMED:
            yield from _choices(prefix.removesuffix("."), value)
            continue
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            groups.append(_group(hint, value, f"{prefix}{name}."))
            continue
        if dataclasses.is_dataclass(element) and isinstance(element, type):
            groups.append(_group(element, OmegaConf.structured(element), f"{prefix}{name}[]."))
        missing = isinstance(values, DictConfig) and OmegaConf.is_missing(values, name)
        yield from _line(f"{prefix}{name}={'???' if missing else _shown(value)}", docs.get(name, ""))
    for group in groups:
        yield from group


def _title(key: str, meaning: str) -> Iterator[str]:
    yield ""
    title = f"{key}: {meaning}"
    yield from textwrap.wrap(title, WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)


def _choices(group: str, selected: str | None) -> Iterator[str]:
    """List the choices of a group of typed keys: first the selected one."""
    for name in sorted(choices(group), key=lambda choice: choice != selected):
        yield from _line(f"{group}={name}", choices(group)[name].meaning)


def _components(group: str, meaning: str, values: Any) -> Iterator[str]:
    """List the components of a group with their options: first the selected ones, with their values.

    Args:
        group: name of the group.
        meaning: its meaning.
        values: its composed values.
    """
    yield from _title(group, meaning)
    selected = {}
    if group == ROBUST:
        selected = {rule["name"]: rule for rule in values.values()}
    elif not OmegaConf.is_missing(values, "name") and "name" in values:
        selected = {values["name"]: values}
    for name in [*selected, *(name for name in choices(group) if name not in selected)]:
        choice, options = choices(group).get(name, PLUG_IN), group_options(group, name)
        same = f" Also has the options of {choice.base}." if choice.base else ""
        yield from _line(f"{group}=[{name}]" if group == ROBUST else f"{group}={name}", f"{choice.meaning}{same}")
        if name in selected:
            options |= {
                key: GroupOption(value, options[key].meaning if key in options else "")
                for key, value in selected[name].items()
                if key != "name"
            }
        prefix = f"{group}.{plugin_key(name)}" if group == ROBUST else group
        for key, option in options.items():
            if name in selected or key in choice.own:
                yield from _line(f"  {prefix}.{key}={_shown(option.value)}", option.meaning)


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


def _group_names(name: str, module: str, schema: str) -> str:
    """List the groups of an application with the names of their options; without presets that set other keys.

    Args:
        name: name of its YAML file.
        module: module of its schema.
        schema: class of its schema.
    """
    defaults = yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8"))["defaults"]
    groups = [group for entry in defaults if isinstance(entry, dict) for group in entry if " " not in group]
    keys = {*known_keys(getattr(importlib.import_module(module), schema)), *groups}
    lines = []
    for group in sorted(groups):
        names = sorted({file.stem for file in (CONF / group).glob("*.yaml")} | installed_plugins(group))
        if group == "preset":
            names = [preset for preset in names if _keys_of(preset) <= keys]
        text = f"{group}: {', '.join(names)}"
        lines += textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent="      ", break_on_hyphens=False)
    return "\n".join(lines)


def _keys_of(preset: str) -> set[str]:
    """Return the keys that a preset sets, and the groups that it selects."""
    return {word.partition("=")[0] for word in settings_of(CONF / "preset" / f"{preset}.yaml", CONF)}


def register_resolvers() -> None:
    """Let help templates interpolate the keys and groups of their application."""
    OmegaConf.register_new_resolver(KEYS, _resolve, replace=True)
    OmegaConf.register_new_resolver(GROUP_NAMES, _group_names, replace=True)
