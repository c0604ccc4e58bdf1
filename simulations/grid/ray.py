"""Simulation on Flower's own runtime: Ray processes act as the devices, each with its own base.

One process per core, or per GPU. They rebuild the setup from the configuration and use the same storage, so that a run
can be continued on any other grid.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import logging
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Any, NoReturn

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # Flower reads its variables on import, here and in actors
os.environ.setdefault("FLWR_LOG_LEVEL", "ERROR")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's future default; avoids its warning

import psutil
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import PARTITION_ID_KEY, ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from omegaconf import OmegaConf

from client.rounds.handler import handle
from client.rounds.scheduler import run_handlers
from client.runtime.client_app import parse_request, reply_message
from common import strict_json
from common.errors import AntherError
from conf.cli import to_object
from conf.schemas.simulation import SimulationConfig
from server.grid.forwarding import ForwardingGrid
from simulations.evaluation import Perform
from simulations.fleet.participants import Participant
from simulations.setup import build, make_perform

_POLL_INTERVAL = 0.05  # seconds between checks for nodes or replies
_RESTART_TIME = 10.0  # seconds that Ray may take to replace a process that died


def require() -> None:
    """Raise AntherError if Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise AntherError("grid=ray: Ray is not installed: pip install 'anther[ray]'")


@contextlib.contextmanager
def ray_grid(config: SimulationConfig, folder: Path, *, devices: int, device: str, memory: int) -> Iterator[Grid]:
    """Yield Flower's grid of the simulated devices.

    Flower runs a ServerApp in its own thread and the simulation in the caller's. Here the
    simulation runs in its own thread: an interrupt arrives in the main thread, which must end the rounds first and then
    the simulation.

    Args:
        config: configuration of the run.
        folder: its output folder, with the storage of the devices.
        devices: number of devices.
        device: type of the torch device of the run's base.
        memory: bytes that jobs may take, of each GPU's memory, or of the machine's memory in total.

    Raises:
        AntherError: Ray is not installed, or ended early.
    """
    require()
    grids: SimpleQueue[Grid | None] = SimpleQueue()
    ended = Event()
    server = ServerApp()

    @server.main()
    def main(grid: Grid, _: Context) -> None:
        grids.put(grid)
        ended.wait()

    config = dataclasses.replace(config, base=dataclasses.replace(config.base, device=device))
    with ThreadPoolExecutor(1, "flower") as pool:
        try:
            running = pool.submit(_run, server, _client(config, folder, memory), devices, gpu=device == "cuda")
            running.add_done_callback(lambda _: grids.put(None))
            yield RayGrid(grids.get(), running, devices)
        except BaseException:
            ended.set()
            _kill_actors()
            raise
        finally:
            ended.set()


class RayGrid(ForwardingGrid):
    """Flower's grid of a simulation without timeouts: it waits for all replies unless the simulation ended.

    A device whose process died, e.g. for lack of memory, is asked once more; replies that it has sealed are not
    computed again.
    """

    def __init__(self, grid: Grid | None, running: Future[None], devices: int) -> None:
        self._running = running
        super().__init__(grid or self._ended())
        while len(list(self.get_node_ids())) < devices:  # Flower registers them beside its ServerApp
            self._wait()

    def send_and_receive(
        self,
        messages: Iterable[Message],
        *,
        timeout: float | None = None,  # noqa: ARG002  # the machine's time is unrelated to that of devices
    ) -> Iterable[Message]:
        sent = list(messages)
        replies = self._replies(sent)
        if lost := {reply.metadata.src_node_id for reply in replies if _died(reply)}:
            time.sleep(_RESTART_TIME)
            replies = [reply for reply in replies if not _died(reply)]
            replies += self._replies([_copy(message) for message in sent if message.metadata.dst_node_id in lost])
        return replies

    def _replies(self, messages: Iterable[Message]) -> list[Message]:
        waiting, replies = set(self.push_messages(messages)), list[Message]()
        while waiting:
            self._wait()
            arrived = list(self.pull_messages(waiting))
            waiting -= {reply.metadata.reply_to_message_id for reply in arrived}
            replies += arrived
        return replies

    def _wait(self) -> None:
        if self._running.done():
            self._ended()
        time.sleep(_POLL_INTERVAL)

    def _ended(self) -> NoReturn:
        reason = self._running.exception()
        raise AntherError(f"grid=ray: Flower's simulation has ended: {reason}: see above") from reason


def _died(reply: Message) -> bool:
    """Return whether the runtime reports a dead actor; errors on a device have another code."""
    return reply.has_error() and reply.error.code == ErrorCode.UNKNOWN


def _copy(message: Message) -> Message:
    return Message(message.content, message.metadata.dst_node_id, message.metadata.message_type)


def _run(server: ServerApp, client: ClientApp, devices: int, *, gpu: bool) -> None:
    """Run Flower's simulation, from the start of Ray to its end."""
    backend: dict[str, Any] = {
        "client_resources": {  # Ray receives all of them as options of an actor
            "num_cpus": 1,
            "num_gpus": int(gpu),
            "max_restarts": -1,
        },
        "init_args": {"address": "local", "include_dashboard": False, "logging_level": "ERROR"},
    }
    run_simulation(server, client, devices, backend_config=backend)


def _kill_actors() -> None:
    """Kill the processes that run abandoned jobs; a single job may take minutes."""
    logging.getLogger("flwr").setLevel(logging.CRITICAL)  # it would log each of them at length
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error, IndexError):  # it has ended already
            if process.cmdline()[0].startswith("ray::ClientAppActor"):
                process.kill()


def _client(config: SimulationConfig, folder: Path, memory: int) -> ClientApp:
    """Build the ClientApp of all devices; it is sent to Ray's processes with every message, so it holds text only."""
    app = ClientApp()
    answer = functools.partial(_answer, strict_json.dumps(config), str(folder.absolute()), memory)
    for register in (app.query(), app.train(), app.train("personalise"), app.evaluate()):
        register(answer)
    return app


def _answer(config: str, folder: str, memory: int, message: Message, context: Context) -> Message:
    """Return the reply of this partition's device; every error becomes its error reply."""
    try:
        people, perform = _setup(config, folder, memory)
        device = people[int(context.node_config[PARTITION_ID_KEY])].device
        outcome = run_handlers({"": handle(parse_request(message), device)}, perform)[""]
    except Exception as error:
        outcome = error
    return reply_message(outcome, message)


@functools.lru_cache(maxsize=1)
def _setup(config: str, folder: str, memory: int) -> tuple[list[Participant], Perform]:
    """Build the participants and `perform` once per process; each process has a core."""
    import ray  # the package, imported late so that this module works without it

    torch.set_num_threads(1)
    settings: SimulationConfig = to_object(OmegaConf.create(strict_json.loads(config)), SimulationConfig)
    base, people, *_ = build(settings, Path(folder))
    sharing = int(ray.cluster_resources()["CPU"]) if base.device.type == "cpu" else 1
    return people, make_perform(settings, base, memory // sharing)
