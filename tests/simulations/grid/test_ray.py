"""Grid on Flower's own simulation: same results as the serial grid, and no processes left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path

import psutil
import pytest
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode

from common.errors import AntherError
from protocol import records
from protocol.messages import DeviceReport, Query
from simulations.grid import ray
from simulations.grid.cohort import CohortGrid
from tests.helpers.fleet import FakeDevice, handle, perform

ROOT = Path(__file__).parents[3]
TINY = [
    "data.writers=3",
    "data.test=2",
    "data.validation=2",
    "rounds=3",
    "adapter.shared.steps=2",
    "adapter.shared.rank=4",
    "adapter.personal.steps=4",
    "adapter.personal.rank=2",
    "adapter.eval_interval=2",
    "evaluation.timesteps=2",
    "evaluation.gallery_size=0",
    "base.device=cpu",
    "tracker=none",
]


class DyingGrid(CohortGrid):
    """Node 2 dies `deaths` times, as Flower reports it, before it answers."""

    deaths = 1

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._maybe_dead(reply) for reply in super().pull_messages(message_ids)]

    def _maybe_dead(self, reply: Message) -> Message:
        if reply.metadata.src_node_id != 2 or not self.deaths:
            return reply
        self.deaths -= 1
        reply.__dict__.update(_content=None, _error=Error(ErrorCode.UNKNOWN, "ActorDiedError"))
        return reply


@pytest.fixture
def dying(monkeypatch: pytest.MonkeyPatch) -> DyingGrid:
    monkeypatch.setattr("simulations.grid.cohort.handle", handle)
    monkeypatch.setattr(ray, "_RESTART_TIME", 0.0)
    return DyingGrid([FakeDevice("a"), FakeDevice("b"), FakeDevice("c")], perform)


def reports(grid: ray.RayGrid) -> dict[int, DeviceReport | None]:
    queries = [Message(records.request_to_records(Query()), node, records.QUERY) for node in grid.get_node_ids()]
    return {
        reply.metadata.src_node_id: None
        if reply.has_error()
        else records.reply_from_records(records.QUERY, reply.content)
        for reply in grid.send_and_receive(queries)
    }


def test_device_is_asked_again_after_its_process_died(dying: DyingGrid) -> None:
    assert {node: report.device for node, report in reports(ray.RayGrid(dying, Future(), 3)).items()} == {
        1: "a",
        2: "b",
        3: "c",
    }
    dying.deaths = 2
    assert [node for node, report in reports(ray.RayGrid(dying, Future(), 3)).items() if report is None] == [2]


def test_ended_simulation_is_an_error(dying: DyingGrid) -> None:
    running: Future[None] = Future()
    running.set_exception(RuntimeError("no room in /dev/shm"))
    with pytest.raises(AntherError, match="no room in /dev/shm"):
        reports(ray.RayGrid(dying, running, 3))
    with pytest.raises(AntherError, match="no room in /dev/shm"):
        ray.RayGrid(None, running, 3)


def command(base: Path, folder: Path, *overrides: str) -> list[str]:
    run = [sys.executable, "-m", "simulations.run", f"base.path={base}", *TINY, *overrides]
    return [*run, f"hydra.run.dir={folder}"]


@pytest.mark.stress
def test_interrupted_and_resumed_run_equals_serial(pipeline_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="pip install anther[ray]")
    environment = {**os.environ, "ANTHER_HOME": str(tmp_path / "home")}
    serial, folder = tmp_path / "serial", tmp_path / "ray"
    subprocess.run(command(pipeline_folder, serial, "grid=serial"), cwd=ROOT, env=environment, check=True)
    with subprocess.Popen(
        command(pipeline_folder, folder, "grid=ray"),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # ignored in background jobs
    ) as process:
        assert process.stdout
        for line in process.stdout:
            if "round 1 of 3" in line:
                started = psutil.Process(process.pid).children(recursive=True)
                process.send_signal(signal.SIGINT)
                break
        rest, _ = process.communicate()
    assert process.returncode == 130
    assert "resume=true" in rest
    assert len(started) > 2
    _, left = psutil.wait_procs(started, timeout=10)
    assert left == []
    subprocess.run(command(pipeline_folder, folder, "grid=ray", "resume=true"), cwd=ROOT, env=environment, check=True)
    resumed, expected = (json.loads((run / "evaluation.json").read_text()) for run in (folder, serial))
    assert [person["name"] for person in resumed] == [person["name"] for person in expected]
    for one, other in zip(resumed, expected, strict=True):
        for arm in ("base", "local", "shared", "personal"):
            assert one[arm]["loss"] == pytest.approx(other[arm]["loss"], rel=1e-4)
