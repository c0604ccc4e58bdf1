"""Configurations for tests whose subject is not their composition."""

from __future__ import annotations

import copy
import shlex
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from common.errors import AntherError
from conf import compose as hydra
from conf.components import GROUPS, ROBUST, ComponentConfig
from conf.schemas.simulation import SimulationConfig

_CONF = Path(hydra.__file__).parent
_GROUPS = {path.parent.name for path in _CONF.glob("*/*.yaml")}


def compose(overrides: str | Sequence[str]) -> SimulationConfig:
    """Return the configuration that `conf.compose.compose` does, a hundred times faster.

    Hydra composes the defaults once in a process. Options of groups are read from their files, and values of keys are
    set in a copy, which the schemas check again. Values of typed keys are YAML, without interpolation. Other words,
    such as a preset or a wrong name, are left to Hydra, with all words about groups.
    """
    words = shlex.split(overrides) if isinstance(overrides, str) else list(overrides)
    values = [word for word in words if _is_value(word)]
    changes: dict[str, Any] = {}
    for word in values:
        key, _, value = word.partition("=")
        *path, name = key.split(".")
        node = changes
        for part in path:
            node = node.setdefault(part, {})
        node[name] = yaml.safe_load(value)
    groups = [word for word in words if word not in values]
    chosen = _chosen(groups)
    config = copy.deepcopy(_composed(tuple(groups) if chosen is None else ()))
    for group, settings in (chosen or {}).items():
        setattr(config, group, settings)
    try:
        changed: SimulationConfig = _changed(config, changes)
    except ValueError as error:  # raised by a schema's __post_init__
        raise AntherError(str(error)) from error
    return changed


@cache
def _composed(words: tuple[str, ...]) -> SimulationConfig:
    return hydra.compose(words)


def _chosen(words: Sequence[str]) -> dict[str, Any] | None:
    """Return the values of the groups that the words choose and change; None if Hydra has to compose them."""
    selections = dict(word.split("=", 1) for word in words if word.partition("=")[0] in _GROUPS)
    options = [word for word in words if word.partition("=")[0] not in selections]
    if len(selections) + len(options) < len(words):  # a group twice
        return None
    composed, chosen = _composed(()), {}
    for group, name in selections.items():
        if group not in (ROBUST, *GROUPS, *_TYPED):
            return None
        if group == ROBUST:
            names = [part.strip() for part in name.strip("[]").split(",") if part.strip()]
            rules = [_option(group, part) for part in names]
            if len(set(names)) < len(names) or any(rule is None for rule in rules):
                return None
            chosen[group] = dict(zip(names, rules, strict=True))
        elif (values := _option(group, name)) is None:
            return None
        else:
            chosen[group] = ComponentConfig.of(values) if group in GROUPS else _typed(_TYPED[group], values)
    for word in options:
        key, equals, _ = word.partition("=")
        group, *path = key.split(".")
        if not equals or group not in (ROBUST, *GROUPS) or len(path) != (2 if group == ROBUST else 1):
            return None
        node = chosen.setdefault(group, copy.deepcopy(getattr(composed, group)))
        node = node.get(path[0], {}) if group == ROBUST else node.options
        if path[-1] not in node or path[-1] == "name":
            return None
        node[path[-1]] = _parser().parse_override(word).value()
    return chosen


_TYPED: dict[str, Any] = {
    group: kind
    for group, kind in get_type_hints(SimulationConfig).items()
    if group in _GROUPS and is_dataclass(kind) and group != "data"  # its options exclude each other's keys
}


def _option(group: str, name: str) -> dict[str, Any] | None:
    """Return the contents of an option's file; None if there is none, or if it sets more than its group."""
    return copy.deepcopy(_contents(group, name))


@cache
def _contents(group: str, name: str) -> dict[str, Any] | None:
    file = _CONF / group / f"{name}.yaml"
    if not file.is_file() or "@package _global_" in file.read_text():
        return None
    values: Any = OmegaConf.to_container(OmegaConf.load(file))
    return None if "defaults" in values or "${" in str(values) else values


def _typed(kind: Any, values: dict[str, Any]) -> Any:
    """Return an instance of a schema with these values."""
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), values))


@cache
def _parser() -> OverridesParser:
    return OverridesParser.create()


def _is_value(word: str) -> bool:
    """Whether a word sets a plain value of a key of the schema."""
    key, _, value = word.partition("=")
    kind: Any = SimulationConfig
    if key in _GROUPS or "=" not in word:
        return False
    for part in key.split("."):
        if not is_dataclass(kind) or part not in {field.name for field in fields(kind)}:
            return False
        kind = get_type_hints(kind)[part]
    return not is_dataclass(kind) and "{" not in value


def _changed(config: Any, changes: dict[str, Any]) -> Any:
    """Replace values of a dataclass and of those that it contains, whose `__post_init__` runs again."""
    kinds = get_type_hints(type(config))
    result = {}
    for name, value in changes.items():
        if isinstance(value, dict):
            result[name] = _changed(getattr(config, name), value)
        else:
            floats = float in (kinds[name], *get_args(kinds[name]))
            result[name] = float(value) if floats and isinstance(value, int | str) else value
    return replace(config, **result)
