"""Runs by their folders: which one a configuration continues, and which are over."""

from __future__ import annotations

import dataclasses
import secrets
from datetime import UTC, datetime
from pathlib import Path

from conf.errors import AntherError
from conf.schemas import Simulation
from privacy.durable import write
from protocol import plain

_CONFIG, _OVER, _REFUSED = "config.json", "over", "refused-"


def run_folder(config: Simulation, runs: Path) -> Path:
    """A new folder for this run, or with `resume` the newest one that was made for the same configuration.

    A device answers for a run and round only once, so a new run must have a name that was never used.

    Raises AntherError if there is nothing to resume.
    """
    if config.resume:
        if (found := newest(config, runs)) is None:
            raise AntherError(f"resume=true: {runs} holds no run of this configuration: leave it out to start one")
        return found
    folder = runs / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
    write(folder / _CONFIG, _identity(config))
    return folder


def newest(config: Simulation, runs: Path) -> Path | None:
    """The newest run that was made for the same configuration."""
    identity = _identity(config)
    for folder in sorted(runs.glob("*/"), reverse=True):
        if (folder / _CONFIG).is_file() and (folder / _CONFIG).read_bytes() == identity:
            return folder
    return None


def end(folder: Path) -> None:
    """Note that nothing of this run is left to do."""
    write(folder / _OVER, b"")


def is_over(folder: Path) -> bool:
    return (folder / _OVER).is_file()


def refuse(runs: Path, flower: int, reason: str) -> None:
    """Note why a ServerApp can't go on before somebody has done something, by the id that Flower gave its run."""
    write(runs / f"{_REFUSED}{flower}", reason.encode())


def refusal(runs: Path, flower: int) -> str | None:
    """What `refuse` has noted; None: nothing, so that whatever ended it may go better the next time."""
    file = runs / f"{_REFUSED}{flower}"
    if not file.is_file():
        return None
    found = file.read_text(encoding="utf-8", errors="replace")
    file.unlink()
    return found


def _identity(config: Simulation) -> bytes:
    return plain.dumps(dataclasses.replace(config, resume=False)).encode()
