"""Where the numbers of a run go, round by round."""

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
    """Takes the numbers of each step; a step may be logged in several parts."""

    def log(self, step: int, values: Values) -> None:
        """Record values by their names; None says that there is none at this step."""
        ...

    def close(self) -> None:
        """Write out what is left."""
        ...


class JSONL:
    """`metrics.jsonl`: one object a line, each line on disk when `log` returns.

    A run that goes on with step s drops the lines from s on, also a half-written last one, so that its file ends up
    as that of a run which never stopped.
    """

    def __init__(self, path: Path, *, start: int = 0) -> None:
        """`start`: the first step to come; of a file that exists, what lies before it is kept."""
        kept = _lines_before(start, path) if path.exists() else []
        unfinished = path.with_name(path.name + ".part")
        unfinished.write_text("".join(kept), encoding="utf-8")
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
    """TensorBoard events, through tensorboardX."""

    def __init__(self, folder: Path, *, start: int = 0) -> None:
        """Events from step `start` on, left by a run that was killed, are hidden from view."""
        from tensorboardX import SummaryWriter  # only runs that want events pay for the import

        self._writer = SummaryWriter(str(folder), purge_step=start or None)

    def log(self, step: int, values: Values) -> None:
        """One scalar per value."""
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write out what is left."""
        self._writer.close()


class CompositeTracker:
    """Several trackers as one."""

    def __init__(self, open_trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(open_trackers)

    def log(self, step: int, values: Values) -> None:
        """Record in every one."""
        for tracker in self._trackers:
            tracker.log(step, values)

    def close(self) -> None:
        """Close every one."""
        for tracker in self._trackers:
            tracker.close()


def round_metrics(record: Round) -> dict[str, Any]:
    """One round as flat numbers, for trackers and displays."""
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
    """What `conf/tracker` asks for, in the output folder of a run that goes on (or begins) with step `start`."""
    opened: list[Tracker] = [JSONL(folder / "metrics.jsonl", start=start)]
    try:
        if tensorboard:
            opened.append(TensorBoard(folder / "tensorboard", start=start))
        yield CompositeTracker(opened)
    finally:
        for tracker in opened:
            tracker.close()


def _lines_before(start: int, path: Path) -> list[str]:
    """The whole lines of the steps before `start`."""
    kept = []
    for data in path.read_bytes().splitlines(keepends=True):
        try:
            line = data.decode("utf-8")
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):  # torn by a kill, or the disk: what follows is newer
            break
        if step >= start or not line.endswith("\n"):
            break
        kept.append(line)
    return kept
