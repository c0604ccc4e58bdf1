"""Output folder of a run: claimed once, resumed only by the same run, never overwritten."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common import atomic_files
from common.errors import AntherError
from conf.components import as_settings
from conf.renames import SIMULATE, first_settings, present_settings
from conf.schemas.simulation import SimulationConfig

RUN = "run.json"
PICTURES = "set of pictures"  # stored; don't change
"""Key of the hash of users' own pictures, and of those of many people, among the assets of a run."""
_ADDED_SETTINGS: dict[str, object] = {
    "data.background": "white",
    "data.path": None,
    "data.person": "person",
    "data.people": None,
    "data.roles": [],
    "data.evaluated_roles": [],
    "data.newcomers": [],
    "evaluation.guide_strength": 1.0,
    "personalization": {"name": "lora"},
}
"""Settings added later, with the values that runs used before: runs with these values keep their hash."""

log = logging.getLogger(__name__)


def config_hash(config: SimulationConfig) -> str:
    """Return the SHA-256 of the configuration without `resume`, which determines a run's results.

    It names the run, and random numbers derive from that name, so keys have their first names here: a renamed key
    changes neither.
    """
    return _hash(_settings(config))


def check(folder: Path, config: SimulationConfig) -> dict[str, Any]:
    """Return the record of the run in `folder`, which has this configuration; empty for a new or empty folder.

    Raises:
        AntherError: the folder contains another run or other files, or no run to resume.
    """
    file = folder / RUN
    if not config.resume:
        if folder.exists() and any(folder.iterdir()):
            hint = "add resume=true to continue it, or name another hydra.run.dir"
            raise AntherError(f"{folder}: already holds {'a run' if file.exists() else 'files'}: {hint}")
        return {}
    if not file.exists():
        raise AntherError(f"{folder}: no run to resume here: name its folder with hydra.run.dir=…, or drop resume=true")
    try:
        record: dict[str, Any] = json.loads(file.read_text())
        if missing := {"config", "config_hash", "assets", "memory"} - record.keys():
            raise ValueError(f"without {', '.join(sorted(missing))}")
    except (AttributeError, ValueError) as error:
        raise AntherError(
            f"{file}: damaged ({error}): this run can't be resumed, start a new one in another folder"
        ) from error
    if record["config_hash"] != config_hash(config) and (changed := _changes(record["config"], config)):
        named = "; ".join([*changed[:3], *([f"and {len(changed) - 3} more"] if len(changed) > 3 else [])])
        raise AntherError(f"{folder}: holds a different run ({named}): resume it with its own settings")
    return record


def stored_settings(stored: dict[str, Any]) -> dict[str, Any]:
    """Return a stored configuration with the present keys, and with the value of every setting that was added later."""
    settings = present_settings(stored, SIMULATE)
    for key, before in _ADDED_SETTINGS.items():
        group, _, name = key.rpartition(".")
        (settings.setdefault(group, {}) if group else settings).setdefault(name, before)
    return settings


def is_resumable(folder: Path) -> bool:
    """Return whether the folder holds a run that can be resumed."""
    return (folder / RUN).exists()


def claim(folder: Path, config: SimulationConfig, assets: Mapping[str, str], *, memory: int) -> int:
    """Claim `folder` for a run, or check that it is this run's, and return the bytes of memory that the run uses.

    Args:
        folder: output folder.
        config: configuration of the run.
        assets: content hashes of the base and the data; a resumed run must have the same.
        memory: bytes for a new run; a resumed run keeps its own value, so that its jobs share passes in the same way.

    Raises:
        AntherError: see `check`; or the run has other assets. Nothing is written then.
    """
    record = check(folder, config)
    if not record:
        record = {"config_hash": config_hash(config), "assets": dict(assets), "memory": memory}
        atomic_files.write(folder / RUN, json.dumps({**record, "config": _settings(config)}, indent=2).encode())
        return memory
    for name, digest in assets.items():
        recorded = record["assets"].get(name)
        if recorded is None and name == PICTURES:
            log.warning(
                "%s: started before runs stored hashes of your own pictures: whether they changed is unknown", folder
            )
        elif recorded != digest:
            raise AntherError(f"{folder}: was run with another {name} ({recorded}): restore it, or start a new run")
    return int(record["memory"])


def _hash(settings: dict[str, Any]) -> str:
    first = first_settings(settings, SIMULATE)
    return hashlib.sha256(json.dumps(first, sort_keys=True).encode()).hexdigest()


def _settings(config: SimulationConfig) -> dict[str, Any]:
    """Return all settings except `resume`, and except added settings with the value that earlier runs used."""
    settings = _all_settings(config)
    for key, before in _ADDED_SETTINGS.items():
        group, _, name = key.rpartition(".")
        part = settings[group] if group else settings
        if part.get(name) == before:
            del part[name]
    return settings


def _all_settings(config: SimulationConfig) -> dict[str, Any]:
    settings = as_settings(config)
    del settings["resume"]
    return settings


def _changes(stored: dict[str, Any], config: SimulationConfig) -> list[str]:
    """List the changes of a stored configuration.

    There may be none if their hashes differ: in earlier versions an option with its default value had another hash than
    an option that was not set.
    """
    present, settings = stored_settings(stored), _all_settings(config)
    changed = [f"{key} was {old}, now {new}" for key, old, new in _differences(present, settings)]
    return changed or ([] if _hash(present) == _hash(settings) else ["robust has another order"])


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            yield f"{prefix}{key}", before, after
