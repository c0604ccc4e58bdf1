"""What `server.supervisor.run` does while a SuperLink fails, over a SuperLink that fails as it is told to."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.errors import AntherError
from conf.schemas.server import ServerConfig
from server.gateway.members import EnrolledNodes
from server.supervisor import run_dirs
from server.supervisor.run import ServerSupervisor

WORDS = ["rounds=3"]


class SuperLink:
    """Args:
    ends: called when a run was followed to its end.
    broken: whether its control API answers nothing.
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
        """Its log breaks off at once."""
        return SimpleNamespace(stdout=io.StringIO(f"log of {run}"), poll=lambda: 0, terminate=str, wait=str)

    @property
    def control(self) -> SuperLink:
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
def passing(monkeypatch) -> SimpleNamespace:
    passing = SimpleNamespace(at=0.0, slept=[])

    def sleep(seconds: float) -> None:
        passing.at += seconds
        passing.slept.append(seconds)

    monkeypatch.setattr("server.supervisor.run.time", SimpleNamespace(monotonic=lambda: passing.at, sleep=sleep))
    monkeypatch.setattr("server.supervisor.run.stop_leftovers", lambda _home: None)
    monkeypatch.setattr("server.supervisor.run._write_results", lambda _folder: ". Its report: page")
    return passing


def served(superlink: SuperLink, folders: Path) -> None:
    config = SimpleNamespace(server=ServerConfig())
    federation = ServerSupervisor(config, WORDS, [*WORDS, "server.port=9999"])  # type: ignore[arg-type]
    federation.superlink = superlink  # type: ignore[assignment]
    register = SimpleNamespace(snapshot=lambda: SimpleNamespace(active_devices=dict))
    federation.nodes = EnrolledNodes(register, superlink)  # type: ignore[arg-type]
    federation._run_until_finished(Path("app"), folders)


def test_a_run_that_fails_and_fails_is_tried_on(tmp_path, capsys):
    def over() -> None:
        run_dirs.mark_finished(run_dirs.run_folder("rounds=3", tmp_path))

    superlink = SuperLink(iter([*[lambda: None] * 12, over]), lambda: False)
    served(superlink, tmp_path)
    said = capsys.readouterr().out
    assert len(superlink.submitted) == 13
    pauses = [int(line.split()[-2]) for line in said.splitlines() if "the run broke off" in line]
    assert pauses == [4, 8, 16, 32, 64, 128, 256, 512, 600, 600, 600, 600]
    folder = run_dirs.newest_run("rounds=3", tmp_path)
    assert said.splitlines()[-1].endswith(f"the run is over: {folder}. Its report: page")
    assert run_dirs.read_command(folder).endswith("server.supervisor.run rounds=3 server.port=9999")


def test_a_superlink_that_answers_500_is_waited_for(tmp_path, passing, capsys):
    superlink = SuperLink(
        iter([lambda: run_dirs.mark_finished(run_dirs.run_folder("rounds=3", tmp_path))]), lambda: passing.at < 1500
    )
    served(superlink, tmp_path)
    said = capsys.readouterr().out
    assert said.count("HTTP 500; retrying") == 1
    assert said.count("has not answered for 10 min: restarting it") == superlink.started == 2
    assert superlink.submitted == ["rounds=3"]


def test_a_run_that_is_at_work_is_never_begun_twice(tmp_path):
    """Its log broke off, and for a while the SuperLink answers nothing."""
    deaf = [False, False, *[True] * 5]
    superlink = SuperLink(
        iter([lambda: run_dirs.mark_finished(run_dirs.run_folder("rounds=3", tmp_path))]),
        lambda: deaf.pop(1) if len(deaf) > 2 else False,
    )
    served(superlink, tmp_path)
    assert superlink.submitted == ["rounds=3"]


def test_what_a_person_has_to_mend_ends_it(tmp_path):
    superlink = SuperLink(iter([lambda: run_dirs.save_refusal(tmp_path, 1, "no such base")]), lambda: False)
    with pytest.raises(AntherError, match="no such base"):
        served(superlink, tmp_path)
