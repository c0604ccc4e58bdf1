"""Trackers: per-round metrics to JSON lines and TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from server.rounds.state import Round
from strategies.round.metrics import device_epsilon

Values = Mapping[str, float | None]


class Tracker(Protocol):
    """Recorder of the metrics of each step; a step may be logged in several parts."""

    def log(self, step: int, values: Values) -> None:
        """Record values by name; None means that there is no value at this step."""
        ...

    def close(self) -> None:
        """Write remaining data."""
        ...


class JSONL:
    """`metrics.jsonl`: one object per line; each line is on disk when `log` returns.

    A run that resumes at step s drops the lines from s on, including an incomplete last line, so that its file equals
    that of an uninterrupted run.
    """

    def __init__(self, path: Path, *, start: int = 0) -> None:
        """Open the file; lines of steps before `start`, the next step, are kept."""
        lines = _lines_before(start, path) if path.exists() else []
        unfinished = path.with_name(path.name + ".part")
        unfinished.write_text("".join(lines), encoding="utf-8")
        unfinished.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, values: Values) -> None:
        """Append one line."""
        self._file.write(json.dumps({"step": step, **values}, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """TensorBoard events, written by tensorboardX."""

    def __init__(self, folder: Path, *, start: int = 0) -> None:
        """Open the folder; events from step `start` on, from an earlier process, are hidden."""
        from tensorboardX import SummaryWriter  # slow import, so only for runs that write events

        self._writer = SummaryWriter(str(folder), purge_step=start or None)

    def log(self, step: int, values: Values) -> None:
        """Write one scalar per value."""
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write remaining data."""
        self._writer.close()


class CompositeTracker:
    """Several trackers as one."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)

    def log(self, step: int, values: Values) -> None:
        """Record in every tracker."""
        for tracker in self._trackers:
            tracker.log(step, values)

    def close(self) -> None:
        """Close every tracker."""
        for tracker in self._trackers:
            tracker.close()


def round_metrics(record: Round) -> dict[str, Any]:
    """Return one round's metrics by name, for trackers and displays."""
    values: dict[str, Any] = {
        "round": record.number,
        "base": record.validation.base,
        "shared": record.validation.shared,
        "improved": record.validation.score,
        "gain": record.validation.gain,
        "gain_error": record.validation.gain_error,
    }
    if train := record.train:
        values |= {
            "asked": train.asked,
            "replied": train.replied,
            "refused": train.dropped.get("refused", 0),
            "dropped": sum(train.dropped.values()),
            "loss": train.loss,
            "bytes_up": train.bytes_up,
            "bytes_down": train.bytes_down,
            "device_seconds": train.seconds,
            "joules": train.joules,
            "epsilon": record.epsilon,
            "device_epsilon": device_epsilon(train),
            "told_epsilon": train.told,
            **train.diagnostics,
        }
    return {**values, "seconds": record.wall_seconds}


@contextmanager
def open_trackers(folder: Path, *, tensorboard: bool, start: int = 0) -> Iterator[Tracker]:
    """Open the trackers of `conf/tracker`, and close them at the end.

    Args:
        folder: output folder of the run.
        tensorboard: whether to write TensorBoard events too.
        start: step at which the run starts or resumes.
    """
    opened: list[Tracker] = [JSONL(folder / "metrics.jsonl", start=start)]
    try:
        if tensorboard:
            opened.append(TensorBoard(folder / "tensorboard", start=start))
        yield CompositeTracker(opened)
    finally:
        for tracker in opened:
            tracker.close()


def _lines_before(start: int, path: Path) -> list[str]:
    """Return the complete lines of steps before `start`."""
    lines = []
    for data in path.read_bytes().splitlines(keepends=True):
        try:
            line = data.decode("utf-8")
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):  # torn by a kill or a disk error: the following lines are newer
            break
        if step >= start or not line.endswith("\n"):
            break
        lines.append(line)
    return lines
