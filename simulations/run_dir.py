"""The output folder of a run: claimed once, continued only by the same run, never written over."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common import atomic_files
from common.errors import AntherError
from conf.schemas.simulation import SimulationConfig

RUN = "run.json"
PICTURES = "set of pictures"
"""Key of the hash of people's own pictures, among the assets of a run."""
_ADDED = {"data.background": "white"}
"""Settings that were added, with what runs went by before there was a choice: these runs keep their hash."""

log = logging.getLogger(__name__)


def config_hash(config: SimulationConfig) -> str:
    """SHA-256 of everything that decides a run's numbers: all of the configuration but `resume`."""
    return hashlib.sha256(json.dumps(_settings(config), sort_keys=True).encode()).hexdigest()


def check(folder: Path, config: SimulationConfig) -> dict[str, Any]:
    """What `folder` says of the run of this configuration that it holds; empty if it is free for a new one.

    Raises:
        AntherError: the folder holds something else, or there is nothing to resume.
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
        found: dict[str, Any] = json.loads(file.read_text())
        if missing := {"config", "config_hash", "assets", "memory"} - found.keys():
            raise ValueError(f"without {', '.join(sorted(missing))}")
    except (AttributeError, ValueError) as error:
        raise AntherError(
            f"{file}: damaged ({error}): this run can't be resumed, start anew in another folder"
        ) from error
    if found["config_hash"] != config_hash(config):
        changed = [f"{key} was {old}, now {new}" for key, old, new in _differences(found["config"], _settings(config))]
        raise AntherError(
            f"{folder}: holds a different run ({'; '.join(changed[:3])}): resume it with its own settings"
        )
    return found


def begun(folder: Path) -> bool:
    """Whether the folder holds a run that can be continued."""
    return (folder / RUN).exists()


def claim(folder: Path, config: SimulationConfig, assets: Mapping[str, str], *, memory: int) -> int:
    """Make `folder` this run's own, or check that it already is; the bytes of memory that the run trains in.

    Args:
        assets: content hashes of the base and the data, which a resumed run must find unchanged.
        memory: for a new run; a resumed one goes on with its own, so that it packs alike.

    Raises:
        AntherError: as for `check`, or it was run with others; nothing was written.
    """
    found = check(folder, config)
    if not found:
        record = {"config_hash": config_hash(config), "assets": dict(assets), "memory": memory}
        atomic_files.write(folder / RUN, json.dumps({**record, "config": _settings(config)}, indent=2).encode())
        return memory
    for name, digest in assets.items():
        began = found["assets"].get(name)
        if began is None and name == PICTURES:
            log.warning(
                "%s: was begun before runs kept hashes of your own pictures: whether they changed isn't known", folder
            )
        elif began != digest:
            raise AntherError(f"{folder}: was run with another {name} ({began}): restore it, or start anew")
    return int(found["memory"])


def _settings(config: SimulationConfig) -> dict[str, Any]:
    """All settings but `resume`; and but those that runs of before hadn't, where they are as those runs were."""
    settings = dataclasses.asdict(config)
    del settings["resume"]
    for key, before in _ADDED.items():
        group, _, name = key.rpartition(".")
        if settings[group].get(name) == before:
            del settings[group][name]
    return settings


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key in sorted(old.keys() | new.keys()):
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            yield from _differences(before, now, f"{prefix}{key}.")
        elif before != now:
            yield f"{prefix}{key}", before, now
