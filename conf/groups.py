"""Options of the Hydra groups, with the comments of their YAML files as documentation.

A file of a group has a comment on its component, then `key: value` with a comment on each option, before or behind it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml

from common.errors import AntherError
from conf.components import ROBUST

CONF = Path(__file__).parent
"""Folder of the Hydra groups."""
SEVERAL = (ROBUST, "preset")
"""Groups that accept several choices."""
_LIST = re.compile(r"\[[^\[\]]*\]")  # one list; several are a sweep
_KEY = re.compile(r"(?P<key>\w+):(?P<value>[^#]*)(?:# ?(?P<comment>.*))?")
_OTHER_FILE = re.compile(r"  - (?!_self_)(\w+)")
_COMMAND = re.compile(r"\s*anther simulate .*")


class GroupOption(NamedTuple):
    """Key of a component's YAML file."""

    value: Any
    meaning: str


class Choice(NamedTuple):
    """Component that a group offers."""

    meaning: str
    """Comment of its file, without the command."""
    own: Mapping[str, GroupOption]
    """Options of its file by key."""
    base: str | None
    """Component of the same group whose options it has too; None for most."""


PLUG_IN = Choice("An installed plug-in, or an import path.", MappingProxyType({}), None)


@cache
def choices(group: str) -> Mapping[str, Choice]:
    """Return the components that the YAML files of a group offer, by name."""
    files = sorted((CONF / group).glob("*.yaml"))
    return MappingProxyType({file.stem: _read(file.read_text(encoding="utf-8")) for file in files})


def group_options(group: str, name: str) -> dict[str, GroupOption]:
    """Return all options of a built-in component; empty for other names.

    Args:
        group: name of the group.
        name: name of the component.
    """
    choice = choices(group).get(name)
    if choice is None:
        return {}
    return {**(group_options(group, choice.base) if choice.base else {}), **choice.own}


def refuse_wrong_selections(words: Sequence[str]) -> None:
    """Refuse several choices of a group that has one, and a rule that is selected twice: Hydra would merge their keys.

    Args:
        words: words of the command line.

    Raises:
        AntherError: a word selects more than its group takes.
    """
    for word in words:
        group, _, value = word.lstrip("+").partition("=")
        if not _LIST.fullmatch(value) or not (CONF / group).is_dir():
            continue
        selected = [choice.strip() for choice in value[1:-1].split(",")]
        if group not in SEVERAL and len(selected) > 1:
            raise AntherError(f"{word}: {group} has one choice; use {group}={selected[-1]}")
        if repeated := next((choice for choice in selected if selected.count(choice) > 1), None):
            raise AntherError(f"{word}: {repeated} is selected twice; name each rule once")


def option_keys(group: str) -> list[str]:
    """Return the keys of a group's options, those of all its components."""
    if group == ROBUST:
        return [f"{group}.{name}.{key}" for name, choice in choices(group).items() for key in choice.own]
    return list(dict.fromkeys(f"{group}.{key}" for choice in choices(group).values() for key in choice.own))


def _read(text: str) -> Choice:
    """Read the text of a YAML file."""
    values, whole = yaml.safe_load(text), "# @package _global_" in text  # `whole`: it sets keys of other groups too
    meaning, comments, own, base = "", [], {}, None
    for line in text.splitlines():
        if line.startswith("#"):
            comments += [] if line.startswith("# @package") else [line.removeprefix("#").strip()]
        elif other := _OTHER_FILE.fullmatch(line):
            base = other[1]
        elif (found := _KEY.fullmatch(line)) and (whole or found["key"] in ("name", "defaults")):
            meaning, comments = meaning or _COMMAND.sub("", " ".join(comments)).strip(), []
        elif found:
            comments.append(found["comment"] or "")
            own[found["key"]] = GroupOption(values[found["key"]], f"{' '.join(comments).strip().rstrip('.')}.")
            comments = []
    return Choice(meaning, own, base)
