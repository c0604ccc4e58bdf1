"""Refuse former names of keys on command lines and in YAML files, and translate them in stored configurations."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from common.errors import AntherError
from conf import renamed_keys
from conf.renamed_keys import Renamed
from conf.stored_components import first_components, present_components, used_words

_CONFIG_DIR = ("--config-dir", "-cd")


class Renames(NamedTuple):
    """Former names that one application knows."""

    keys: Sequence[Renamed] = ()
    groups: Sequence[Renamed] = ()
    components: Sequence[Renamed] = ()
    """Keys of components, under their second names if they were renamed before."""
    selected: Sequence[Renamed] = ()
    """The same for keys that a YAML file may have."""


NO_RENAMES = Renames()
_COMPONENTS = (renamed_keys.SIMULATION_GROUPS, renamed_keys.COMPONENTS, renamed_keys.SELECTED)
SIMULATE = Renames(renamed_keys.SIMULATION, *_COMPONENTS)
SERVE = Renames((*renamed_keys.SIMULATION, *renamed_keys.SERVER), *_COMPONENTS)
NODE, PLAN = Renames(renamed_keys.NODE), Renames(renamed_keys.PLAN)
AUDIT, PRETRAINING = Renames(renamed_keys.AUDIT), Renames(renamed_keys.PRETRAINING)
BY_APPLICATION = {
    "simulate": SIMULATE,
    "serve": SERVE,
    "audit": AUDIT,
    "train_base": PRETRAINING,
    "train_judge": PRETRAINING,
}
"""By the name of the Hydra configuration."""


def refuse_renamed(words: Sequence[str], renames: Renames) -> None:
    """Refuse the first word of a command line, or key of a YAML file in its `--config-dir`, with a former name.

    Raises:
        AntherError: one line that names the present key and value.
    """
    for word in words:
        present = present_spellings(word, renames)
        if present != [word.lstrip("+~")]:
            raise AntherError(f"{word.lstrip('+~')}: renamed to {' or '.join(present)}")
    for folder in _config_dirs(words):
        for file in sorted(folder.rglob("*.yaml")):
            for word in settings_of(file, folder):
                present = present_spellings(word, renames._replace(selected=()))
                if present != [word]:
                    raise AntherError(f"{file}: {word}: renamed to {' or '.join(present)}")


def present_spellings(word: str, renames: Renames) -> list[str]:
    """Return `key=value` under its present names, without Hydra's prefixes `+` and `~`.

    Returns:
        The word itself if nothing was renamed; several words if a key became an option of several components.
    """
    key, equals, value = word.lstrip("+~").partition("=")
    for row in (*renames.groups, *renames.keys):
        if row.old == key:
            key, value = row.new, _present_value(value, row)
            break
    moved = [new for row in (*renames.components, *renames.selected) if (new := _moved(key, row))]
    return [f"{new}{equals}{value}" for new in moved or [key]]


def present_words(words: Sequence[str], renames: Renames) -> list[str]:
    """Translate stored words; those without a former name stay as they are."""
    present = [spelling for word in words for spelling in _stored_spellings(word, renames)]
    return used_words(present) if renames.components else present


def present_key(key: str, renames: Renames) -> str | None:
    """Return the present name of a former key, of a former group of keys their present groups; None for other keys."""
    key = re.sub(r"\[\d+\]", "[]", key)
    if moved := [new for row in (*renames.components, *renames.selected) if (new := _moved(key, row))]:
        return " or ".join(moved)
    renamed = [row for row in (*renames.keys, *renames.groups) if row.old != row.new]
    if exact := next((row.new for row in renamed if row.old == key), None):
        return exact
    groups = {row.new.rpartition(".")[0] or row.new for row in renamed if row.old.startswith(f"{key}.")}
    present = {row.new.split(".")[0] for row in renames.keys}
    return None if not groups or key in present else ", ".join(sorted(groups))


def present_option(group: str, option: str, renames: Renames) -> str | None:
    """Return the present name of a group's former option.

    Args:
        group: configuration group, such as `aggregation`.
        option: name of the option.
        renames: former names of the application.

    Returns:
        `group=option` under its present names; None for an option that was not renamed.
    """
    word = f"{group}={option}"
    present = present_spellings(word, renames)
    return None if present == [word] else " or ".join(present)


def present_settings(settings: dict[str, Any], renames: Renames) -> dict[str, Any]:
    """Translate a stored configuration, nested as its schema: every value moves to its present key."""
    present = _moved_settings(settings, renames)
    return present_components(present) if renames.components else present


def first_settings(settings: dict[str, Any], renames: Renames) -> dict[str, Any]:
    """Return a configuration under the first name of every key: the inverse of `present_settings`."""
    rows = {row.new: row for row in reversed(renames.keys)}.values()
    values = ({new: _YAML_BOOLS.get(old, old) for old, new in row.values.items()} for row in rows)
    reverse = [Renamed(row.new, row.old, names) for row, names in zip(rows, values, strict=True)]
    return _moved_settings(first_components(settings) if renames.components else settings, Renames(reverse))


def _moved_settings(settings: dict[str, Any], renames: Renames) -> dict[str, Any]:
    """Move every value to the new name of its key."""
    present = copy.deepcopy(settings)
    moved: list[tuple[str, Any]] = []
    for row in renames.keys:
        parent, _, element = row.old.partition("[].")
        if element:
            _rename_elements(_get(present, parent), element, row)
        elif (value := _pop(present, row.old.split("."))) is not _ABSENT:
            moved.append((row.new, _present_setting(value, row)))
    for key, value in moved:
        *parents, name = key.split(".")
        group = present
        for part in parents:
            group = group.setdefault(part, {})
        group[name] = value
    return present


_ABSENT = object()
_YAML_BOOLS = {"true": True, "false": False}


def _moved(key: str, row: Renamed) -> str | None:
    """Return the present name of a key, or of a key of a group; None if it was not renamed by this row."""
    if row.old.endswith("."):
        return row.new + key.removeprefix(row.old) if key.startswith(row.old) else None
    return row.new if row.old == key else None


def _stored_spellings(word: str, renames: Renames) -> list[str]:
    present = present_spellings(word, renames)
    return [word] if present == [word.lstrip("+~")] else present


def _present_value(value: str, row: Renamed) -> str:
    return re.sub(r"[\w-]+", lambda name: row.values.get(name[0], row.values.get(name[0].lower(), name[0])), value)


def _present_setting(value: Any, row: Renamed) -> Any:
    if not row.values:
        return value
    if isinstance(value, list):
        return [_present_setting(element, row) for element in value]
    return row.values.get(str(value).lower() if isinstance(value, bool) else value, value)


def _get(settings: Any, key: str) -> Any:
    for part in key.split("."):
        settings = settings.get(part) if isinstance(settings, dict) else None
    return settings


def _rename_elements(elements: Any, name: str, row: Renamed) -> None:
    for element in elements if isinstance(elements, list) else ():
        if name in element:
            element[row.new.rpartition("[].")[2]] = element.pop(name)


def _pop(settings: Any, path: list[str]) -> Any:
    """Remove a value, and the groups that it leaves empty."""
    if not isinstance(settings, dict) or path[0] not in settings:
        return _ABSENT
    if len(path) == 1:
        return settings.pop(path[0])
    value = _pop(settings[path[0]], path[1:])
    if value is not _ABSENT and not settings[path[0]]:
        del settings[path[0]]
    return value


def _config_dirs(words: Sequence[str]) -> Iterator[Path]:
    for word, following in zip(words, [*words[1:], ""], strict=False):
        option, equals, value = word.partition("=")
        if option in _CONFIG_DIR:
            yield Path(value if equals else following)


def settings_of(file: Path, folder: Path) -> Iterator[str]:
    """List the settings of a YAML file as `key=value` with full keys, and the options of its defaults list."""
    try:
        text = file.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):  # Hydra reports it if it is used
        return
    if not isinstance(content, dict):
        return
    for default in content.pop("defaults", None) or ():
        if isinstance(default, dict):
            yield from (
                f"{str(group).removeprefix('override ').lstrip('/')}={_text(default[group])}" for group in default
            )
    package = re.search(r"^# *@package +(\S+)", text, re.MULTILINE)
    name = package[1] if package else ".".join(file.parent.relative_to(folder).parts)
    yield from _flat(content, "" if name in ("", "_global_") else f"{name}.")


def _flat(settings: dict[Any, Any], prefix: str) -> Iterator[str]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
            continue
        groups = [element for element in value if isinstance(element, dict)] if isinstance(value, list) else []
        for group in groups:
            yield from _flat(group, f"{prefix}{key}[].")
        if not groups:
            yield f"{prefix}{key}={_text(value)}"


def _text(value: Any) -> str:
    """Write a value of YAML as on a command line."""
    if isinstance(value, list):
        return f"[{','.join(map(_text, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
