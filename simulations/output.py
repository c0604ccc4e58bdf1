"""The output folder of a run: claimed once, continued only by the same run, never written over."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from conf.errors import AntherError
from conf.schemas import Simulation
from privacy import durable

RUN = "run.json"


def config_hash(config: Simulation) -> str:
    """SHA-256 of everything that decides a run's numbers: all of the configuration but `resume`."""
    return hashlib.sha256(json.dumps(_settings(config), sort_keys=True).encode()).hexdigest()


def claim(folder: Path, config: Simulation, assets: Mapping[str, str], *, memory: int) -> int:
    """Make `folder` this run's own, or check that it already is; the bytes of memory that the run trains in.

    Args:
        assets: content hashes of the base and the data, which a resumed run must find unchanged.
        memory: for a new run; a resumed one goes on with its own, so that it packs alike.

    Raises:
        AntherError: the folder holds something else, or there is nothing to resume; nothing was written.
    """
    settings = _settings(config)
    record = {"config_hash": config_hash(config), "assets": dict(assets), "memory": memory, "config": settings}
    file = folder / RUN
    if not config.resume:
        if folder.exists() and any(folder.iterdir()):
            hint = "add resume=true to continue it, or name another hydra.run.dir"
            raise AntherError(f"{folder}: already holds {'a run' if file.exists() else 'files'}: {hint}")
        durable.write(file, json.dumps(record, indent=2).encode())
        return memory
    if not file.exists():
        raise AntherError(f"{folder}: no run to resume here: name its folder with hydra.run.dir=…, or drop resume=true")
    try:
        found = json.loads(file.read_text())
        before, memory = found["config"], int(found["memory"])
    except (ValueError, KeyError, TypeError) as error:
        raise AntherError(
            f"{file}: damaged ({error}): this run can't be resumed, start anew in another folder"
        ) from error
    if found["config_hash"] != record["config_hash"]:
        changed = [f"{key} was {old}, now {new}" for key, old, new in _differences(before, settings)]
        raise AntherError(
            f"{folder}: holds a different run ({'; '.join(changed[:3])}): resume it with its own settings"
        )
    for name, digest in assets.items():
        if found["assets"].get(name) != digest:
            raise AntherError(
                f"{folder}: was run with another {name} ({found['assets'].get(name)}): restore it, or start anew"
            )
    return memory


def _settings(config: Simulation) -> dict[str, Any]:
    settings = dataclasses.asdict(config)
    del settings["resume"]
    return settings


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key in sorted(old.keys() | new.keys()):
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            yield from _differences(before, now, f"{prefix}{key}.")
        elif before != now:
            yield f"{prefix}{key}", before, now
