"""Runs by their folders: which one the same words continue, and which are over."""

from __future__ import annotations

import secrets
import shlex
from datetime import UTC, datetime
from pathlib import Path

from common.atomic_files import write
from common.errors import AntherError

_WORDS, _OVER, _COMMAND, _REFUSED = "words", "over", "command", "refused-"
_RESUME = "resume=true"


def run_folder(overrides: str, runs: Path) -> Path:
    """A new folder for the run of these words, or with `resume=true` among them the newest one that was made for them.

    It goes by the words, not by all that they are composed to: a release that adds a key continues the run all the
    same. A device answers for a run and round only once, so a new run must have a name that was never used.

    Raises AntherError if there is nothing to resume.
    """
    if _RESUME in shlex.split(overrides):
        if (found := newest_run(overrides, runs)) is None:
            raise AntherError(f"resume=true: {runs} holds no run of this configuration: leave it out to start one")
        return found
    folder = runs / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
    write(folder / _WORDS, _identity(overrides))
    return folder


def newest_run(overrides: str, runs: Path) -> Path | None:
    """The newest run that was made for the same words."""
    identity = _identity(overrides)
    for folder in sorted(runs.glob("*/"), reverse=True):
        if (folder / _WORDS).is_file() and (folder / _WORDS).read_bytes() == identity:
            return folder
    return None


def mark_finished(folder: Path) -> None:
    """Note that nothing of this run is left to do."""
    write(folder / _OVER, b"")


def is_finished(folder: Path) -> bool:
    return (folder / _OVER).is_file()


def save_refusal(runs: Path, flower: int, reason: str) -> None:
    """Note why a ServerApp can't go on before somebody has done something, by the id that Flower gave its run."""
    write(runs / f"{_REFUSED}{flower}", reason.encode())


def take_refusal(runs: Path, flower: int) -> str | None:
    """What `save_refusal` has noted; None: nothing, so that whatever ended it may go better the next time."""
    file = runs / f"{_REFUSED}{flower}"
    if not file.is_file():
        return None
    found = file.read_text(encoding="utf-8", errors="replace")
    file.unlink()
    return found


def read_overrides(folder: Path) -> str:
    """What a run was begun with; AntherError if the folder holds none."""
    try:
        return shlex.join((folder / _WORDS).read_text(encoding="utf-8").splitlines())
    except OSError as error:
        raise AntherError(f"{folder}: holds no run ({error.strerror}): name its folder, in ANTHER_HOME/runs") from error


def last_round(folder: Path | None) -> int:
    """The last whole round of a run; -1: none."""
    found = sorted(folder.glob("checkpoints/round-*")) if folder else []
    return int(found[-1].name.removeprefix("round-")) if found else -1


def save_command(folder: Path, command: str) -> None:
    """Note what its operator typed to start a run."""
    write(folder / _COMMAND, command.encode())


def read_command(folder: Path) -> str | None:
    """What `save_command` has noted."""
    file = folder / _COMMAND
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _identity(overrides: str) -> bytes:
    """A word a line, whether or not a run is continued."""
    return "".join(f"{word}\n" for word in shlex.split(overrides) if word != _RESUME).encode()
