"""Folders of runs: find the run to continue by its arguments, and record which runs are finished."""

from __future__ import annotations

import secrets
import shlex
from datetime import UTC, datetime
from pathlib import Path

from common.atomic_files import write
from common.errors import AntherError
from conf.renames import SIMULATE, present_words
from conf.simulation_keys import federation_words

# File names in a run's folder, and for refusals in its parent (stored; don't change).
_ARGUMENTS, _FINISHED, _COMMAND, _REFUSED = "words", "over", "command", "refused-"
_RESUME = "resume=true"


def run_folder(overrides: str, runs: Path) -> Path:
    """Create the folder of a new run, or with `resume=true` return the newest one with the same arguments.

    Runs are identified by their arguments, not by the composed configuration: after a release that adds a key, the run
    still continues. A device answers only once per run and round, so a new run needs a name that was never used.

    Raises:
        AntherError: there is nothing to resume.
    """
    if _RESUME in shlex.split(overrides):
        if (folder := newest_run(overrides, runs)) is None:
            raise AntherError(
                f"resume=true: {runs} contains no run of this configuration: omit resume=true to start one"
            )
        return folder
    folder = runs / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
    write(folder / _ARGUMENTS, _identity(overrides))
    return folder


def newest_run(overrides: str, runs: Path) -> Path | None:
    """Return the newest run with the same arguments."""
    identity = _identity(overrides)
    for folder in sorted(runs.glob("*/"), reverse=True):
        if (folder / _ARGUMENTS).is_file() and _identity(read_overrides(folder)) == identity:
            return folder
    return None


def mark_finished(folder: Path) -> None:
    """Record that the run is finished."""
    write(folder / _FINISHED, b"")


def is_finished(folder: Path) -> bool:
    """Return whether `mark_finished` was called."""
    return (folder / _FINISHED).is_file()


def save_refusal(runs: Path, flower_run: int, reason: str) -> None:
    """Record the reason why a ServerApp can't continue without action by the operator.

    Args:
        runs: folder of all runs.
        flower_run: id of the Flower run.
        reason: one line.
    """
    write(runs / f"{_REFUSED}{flower_run}", reason.encode())


def take_refusal(runs: Path, flower_run: int) -> str | None:
    """Return and remove the reason that `save_refusal` recorded; None if there is none, so that a retry may succeed."""
    file = runs / f"{_REFUSED}{flower_run}"
    if not file.is_file():
        return None
    reason = file.read_text(encoding="utf-8", errors="replace")
    file.unlink()
    return reason


def read_overrides(folder: Path) -> str:
    """Return the arguments of a run, under the keys' present names and without those that only a simulation uses.

    Raises:
        AntherError: the folder contains no run.
    """
    try:
        arguments = (folder / _ARGUMENTS).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise AntherError(
            f"{folder}: contains no run ({error.strerror}): name a run's folder, in ANTHER_HOME/runs"
        ) from error
    return shlex.join(federation_words(present_words(arguments, SIMULATE)))


def last_round(folder: Path | None) -> int:
    """Return the number of a run's last completed round; -1 if there is none."""
    checkpoints = sorted(folder.glob("checkpoints/round-*")) if folder else []
    return int(checkpoints[-1].name.removeprefix("round-")) if checkpoints else -1


def save_command(folder: Path, command: str) -> None:
    """Record the command that started a run."""
    write(folder / _COMMAND, command.encode())


def read_command(folder: Path) -> str | None:
    """Return the command that `save_command` recorded."""
    file = folder / _COMMAND
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _identity(overrides: str) -> bytes:
    """Encode the arguments, one per line, without `resume=true`."""
    return "".join(f"{word}\n" for word in federation_words(shlex.split(overrides)) if word != _RESUME).encode()
