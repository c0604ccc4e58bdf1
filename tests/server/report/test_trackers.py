"""Trackers: metrics.jsonl survives kills, and every tracker gets every value."""

import json
import sys
from pathlib import Path

import pytest

from server.report.trackers import JSONL, CompositeTracker, TensorBoard, Tracker, open_trackers


def log(tracker: Tracker, steps: range) -> None:
    for step in steps:
        tracker.log(step, {"loss": 1 / (step + 1), "bytes_up": 10})
        tracker.log(step, {"ε": 0.5 * step, "joules": None})
    tracker.close()


def test_each_line_is_written_immediately(tmp_path: Path) -> None:
    tracker = JSONL(tmp_path / "metrics.jsonl")
    tracker.log(0, {"loss": 0.5})
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()] == [{"step": 0, "loss": 0.5}]
    tracker.close()


@pytest.mark.parametrize("torn", ["", '{"step": 3, "lo', '{"step": 4, "loss": 1}', "\n\n", '{"step"'])
def test_resumed_file_equals_uninterrupted(tmp_path: Path, torn: str) -> None:
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    log(JSONL(whole), range(6))
    log(JSONL(killed), range(4))
    killed.write_text(killed.read_text() + torn)
    log(JSONL(killed, start=3), range(3, 6))
    assert killed.read_text() == whole.read_text()


def test_incomplete_step_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log(JSONL(path), range(2))
    path.write_text("".join(path.open().readlines()[:-1]))  # step 1 has only its first part
    log(JSONL(path, start=1), range(1, 2))
    assert len(path.read_text().splitlines()) == 4


def test_new_run_starts_empty(tmp_path: Path) -> None:
    log(JSONL(tmp_path / "metrics.jsonl"), range(3))
    JSONL(tmp_path / "metrics.jsonl").close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_composite_forwards_everything(tmp_path: Path) -> None:
    log(CompositeTracker([JSONL(tmp_path / "a"), JSONL(tmp_path / "b")]), range(2))
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text() != ""


def test_tensorboard_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "with").mkdir()
    with open_trackers(tmp_path / "with", tensorboard=True) as both:
        both.log(0, {"loss": 0.5, "epsilon": None})
    events = list((tmp_path / "with" / "tensorboard").iterdir())
    assert [event.name.startswith("events.out.tfevents") for event in events] == [True]
    assert b"loss" in events[0].read_bytes()
    assert b"epsilon" not in events[0].read_bytes()

    (tmp_path / "without").mkdir()
    monkeypatch.setitem(sys.modules, "tensorboardX", None)  # importing it would raise
    with open_trackers(tmp_path / "without", tensorboard=False) as one:
        one.log(0, {"loss": 0.5})
    assert [path.name for path in (tmp_path / "without").iterdir()] == ["metrics.jsonl"]


def test_trackers_close_when_a_run_fails(tmp_path: Path) -> None:
    opened = []

    def fail() -> None:
        with open_trackers(tmp_path, tensorboard=False) as one:
            opened.append(one)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    with pytest.raises(ValueError, match="closed"):
        opened[0].log(1, {"loss": 0.5})


def test_tensorboard_purges_repeated_steps(tmp_path: Path) -> None:
    log(CompositeTracker([TensorBoard(tmp_path)]), range(4))
    log(CompositeTracker([TensorBoard(tmp_path, start=2)]), range(2, 4))
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    newest = max(tmp_path.iterdir(), key=lambda path: (path.stat().st_mtime_ns, path.name)).read_bytes()
    starts, offset = [], 0
    while offset < len(newest):  # a record: length, its CRC, content, its CRC
        length = int.from_bytes(newest[offset : offset + 8], "little")
        event = Event.FromString(newest[offset + 12 : offset + 12 + length])
        if event.session_log.status == SessionLog.START:
            starts.append(event.step)
        offset += 16 + length
    assert starts == [2]


def test_invalid_utf8_ends_the_kept_lines(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 0}\n{"step": 1, "x": "\xff\xfe"}\n{"step": 2}\n')
    with open_trackers(tmp_path, tensorboard=False, start=3) as tracker:
        tracker.log(3, {"loss": 1.0})
    assert [json.loads(line)["step"] for line in file.read_text(encoding="utf-8").splitlines()] == [0, 3]
