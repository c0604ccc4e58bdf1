"""Keys that only a simulation uses: a server refuses them where a person writes them, and drops stored ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from common.errors import AntherError
from conf.explain import known_keys
from conf.renames import settings_of
from conf.schemas.federation import FederationConfig
from conf.schemas.simulation import SimulationConfig

_CONF = Path(__file__).parent
"""Folder of the Hydra groups."""


def refuse_simulation_keys(words: Sequence[str]) -> None:
    """Raise AntherError with one line for the first word that a server has no use for."""
    for word in words:
        if reason := refusal(word):
            raise AntherError(reason)


def refusal(word: str) -> str | None:
    """Return in one line why a server has no use for a `key=value` or `group=option`; None if it has."""
    key, _, value = word.lstrip("+~").partition("=")
    if _is_simulated(key):
        mend = "set data.devices, the number of devices" if key == "data.writers" else "leave it out"
        return f"{key}: only a simulation uses it, not a server; {mend}"
    if key == "preset" and (keys := _simulated_keys(value)):
        return f"preset={value}: sets {', '.join(keys)}, which only a simulation uses; set its other keys one by one"
    return None


def federation_words(words: Sequence[str]) -> list[str]:
    """Return the stored words of a server's run without those that only a simulation uses.

    A server was a simulation with invented writers before: their number was the number of devices, unless that was
    given too.
    """
    kept = [word for word in words if not _is_simulated(word.lstrip("+~").partition("=")[0])]
    writers = [word.partition("=")[2] for word in words if word.lstrip("+").startswith("data.writers=")]
    if writers and not any(word.lstrip("+").startswith("data.devices=") for word in kept):
        kept.append(f"data.devices={writers[-1]}")
    return kept


@cache
def _simulated_keys(preset: str) -> tuple[str, ...]:
    """Return the keys that a preset sets, and the groups that it selects, that only a simulation has."""
    file = _CONF / "preset" / f"{preset}.yaml"
    if not re.fullmatch(r"\w+", preset) or not file.is_file():
        return ()
    keys = (word.partition("=")[0] for word in settings_of(file, _CONF))
    return tuple(dict.fromkeys(key for key in keys if _is_simulated(key)))


def _is_simulated(key: str) -> bool:
    """Return whether only a simulation has this key or group, or one that contains it; `data=…` selects writers."""
    parts = re.sub(r"\[\d+\]", "", key).split(".")
    return key == "data" or any(".".join(parts[:end]) in _only_simulated() for end in range(1, len(parts) + 1))


@cache
def _only_simulated() -> frozenset[str]:
    return frozenset(known_keys(SimulationConfig)) - frozenset(known_keys(FederationConfig))
