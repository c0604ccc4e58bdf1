"""The supervisor during failures of the SuperLink, with a fake SuperLink."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.errors import AntherError
from conf.schemas.server import ServerConfig
from server.supervisor import run_dirs
from server.supervisor.enrolled_nodes import EnrolledNodes
from server.supervisor.run import ServerSupervisor

WORDS = ["rounds=3"]


class _FakeSuperLink:
    """A SuperLink that fails on request.

    Args:
        ends: called at the end of each run.
        broken: returns whether the control API fails.
    """

    certificates = None
    home = Path("/nowhere")

    def __init__(self, ends: Iterator[Callable[[], None]], broken: Callable[[], bool]) -> None:
        self.ends, self.broken = ends, broken
        self.alive, self.started, self.submitted = True, 0, list[str]()
        self.running = False

    def stored_bytes(self) -> int:
        return 0

    def start(self) -> None:
        self.alive, self.started = True, self.started + 1

    def stop(self) -> None:
        self.alive = False

    def submit(self, _app: Path, overrides: str, settings: dict[str, float]) -> int:
        assert not self.running
        assert settings == {"min_devices": 2, "patience": 48.0}
        self.running = True
        self.submitted.append(overrides)
        return len(self.submitted)

    def watch(self, run: int) -> SimpleNamespace:
        """Return a process whose log ends immediately."""
        return SimpleNamespace(stdout=io.StringIO(f"log of {run}"), poll=lambda: 0, terminate=str, wait=str)

    @property
    def control(self) -> _FakeSuperLink:
        return self

    def check(self) -> None:
        self._answers()

    def status(self, _run: int) -> str:
        self._answers()
        self.running = False
        next(self.ends)()
        return "finished:failed"

    def _answers(self) -> None:
        if self.broken():
            raise AntherError("HTTP 500")


@pytest.fixture(autouse=True)
def clock(monkeypatch) -> SimpleNamespace:
    clock = SimpleNamespace(at=0.0, slept=[])

    def sleep(seconds: float) -> None:
        clock.at += seconds
        clock.slept.append(seconds)

    monkeypatch.setattr("server.supervisor.run.time", SimpleNamespace(monotonic=lambda: clock.at, sleep=sleep))
    monkeypatch.setattr("server.supervisor.run.stop_leftovers", lambda _home: None)
    monkeypatch.setattr("server.supervisor.run._write_results", lambda _folder: ". Its report: page")
    return clock


def serve(superlink: _FakeSuperLink, runs: Path) -> None:
    config = SimpleNamespace(server=ServerConfig())
    supervisor = ServerSupervisor(config, WORDS, [*WORDS, "server.port=9999"])  # type: ignore[arg-type]
    supervisor.superlink = superlink  # type: ignore[assignment]
    registry = SimpleNamespace(snapshot=lambda: SimpleNamespace(active_devices=dict))
    supervisor.nodes = EnrolledNodes(registry, superlink)  # type: ignore[arg-type]
    supervisor._run_until_finished(Path("app"), runs)


def test_failing_run_is_retried(tmp_path, capsys):
    def finish() -> None:
        run_dirs.mark_finished(run_dirs.run_folder("rounds=3", tmp_path))

    superlink = _FakeSuperLink(iter([*[lambda: None] * 12, finish]), lambda: False)
    serve(superlink, tmp_path)
    output = capsys.readouterr().out
    assert len(superlink.submitted) == 13
    pauses = [int(line.split()[-2]) for line in output.splitlines() if "the run broke off" in line]
    assert pauses == [4, 8, 16, 32, 64, 128, 256, 512, 600, 600, 600, 600]
    folder = run_dirs.newest_run("rounds=3", tmp_path)
    assert output.splitlines()[-1].endswith(f"the run is over: {folder}. Its report: page")
    assert run_dirs.read_command(folder).endswith("server.supervisor.run rounds=3 server.port=9999")


def test_failing_superlink_is_waited_for(tmp_path, clock, capsys):
    superlink = _FakeSuperLink(
        iter([lambda: run_dirs.mark_finished(run_dirs.run_folder("rounds=3", tmp_path))]), lambda: clock.at < 1500
    )
    serve(superlink, tmp_path)
    output = capsys.readouterr().out
    assert output.count("HTTP 500; retrying") == 1
    assert output.count("has not answered for 10 min: restarting it") == superlink.started == 2
    assert superlink.submitted == ["rounds=3"]


def test_running_run_is_not_submitted_twice(tmp_path):
    """The log broke off, and the SuperLink doesn't answer for a while."""
    failures = [False, False, *[True] * 5]
    superlink = _FakeSuperLink(
        iter([lambda: run_dirs.mark_finished(run_dirs.run_folder("rounds=3", tmp_path))]),
        lambda: failures.pop(1) if len(failures) > 2 else False,
    )
    serve(superlink, tmp_path)
    assert superlink.submitted == ["rounds=3"]


def test_refusal_ends_the_server(tmp_path):
    superlink = _FakeSuperLink(iter([lambda: run_dirs.save_refusal(tmp_path, 1, "no such base")]), lambda: False)
    with pytest.raises(AntherError, match="no such base"):
        serve(superlink, tmp_path)
