"""The same simulation on Flower's own runtime: Ray processes play the devices, each with a base of its own.

One process for each core, or for each GPU. They make the configuration's world again and keep a device's things in the
same place, so that the run goes on from there as on any other grid.
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

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # Flower looks at its own as it is imported, here and in actors
os.environ.setdefault("FLWR_LOG_LEVEL", "ERROR")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's next default, of which it would warn

import psutil
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import PARTITION_ID_KEY, ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from omegaconf import OmegaConf

from client.app import parse_request, reply_message
from client.rounds.handler import handle
from client.rounds.scheduler import run_handlers
from common import strict_json
from common.errors import AntherError
from conf.cli import to_object
from conf.schemas.simulation import SimulationConfig
from server.grid.forwarding import ForwardingGrid
from simulations.evaluation import Perform
from simulations.fleet.participants import Participant
from simulations.setup import build, make_perform

_POLL = 0.05  # seconds between two looks for nodes or replies
_RESTART = 10.0  # seconds that Ray may take to replace a process that died


def require() -> None:
    """AntherError if Ray isn't installed."""
    if importlib.util.find_spec("ray") is None:
        raise AntherError("grid=ray: Ray is not installed: pip install 'anther[ray]'")


@contextlib.contextmanager
def ray_grid(config: SimulationConfig, folder: Path, *, devices: int, device: str, memory: int) -> Iterator[Grid]:
    """Flower's grid over the devices of the configuration's world, until the context ends.

    Flower runs a ServerApp in a thread of its own and the simulation in the caller's. Here it is the other way round:
    an interrupt comes to the main thread, which is to end the rounds first and then the simulation.

    Args:
        folder: of the run, where devices keep what is theirs.
        devices: how many there are.
        device: type of the torch device that the run's base is on.
        memory: bytes that jobs may take, of a GPU's memory each, or of the machine's together.

    Raises AntherError: Ray is not installed, or has ended before its time.
    """
    require()
    grids: SimpleQueue[Grid | None] = SimpleQueue()
    over = Event()
    server = ServerApp()

    @server.main()
    def main(grid: Grid, _: Context) -> None:
        grids.put(grid)
        over.wait()

    config = dataclasses.replace(config, base=dataclasses.replace(config.base, device=device))
    with ThreadPoolExecutor(1, "flower") as pool:
        try:
            running = pool.submit(_run, server, _client(config, folder, memory), devices, gpu=device == "cuda")
            running.add_done_callback(lambda _: grids.put(None))
            yield RayGrid(grids.get(), running, devices)
        except BaseException:
            over.set()
            _abandon_jobs()
            raise
        finally:
            over.set()


class RayGrid(ForwardingGrid):
    """Flower's grid of a simulation, patient: no reply is late, whatever the timeout, unless the simulation ended.

    A device whose process died, for want of memory say, is asked once more: what it has sealed it won't do again.
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
        timeout: float | None = None,  # noqa: ARG002  # the machine's time, which says nothing of the devices'
    ) -> Iterable[Message]:
        asked = list(messages)
        replies = self._replies(asked)
        if lost := {reply.metadata.src_node_id for reply in replies if _died(reply)}:
            time.sleep(_RESTART)
            replies = [reply for reply in replies if not _died(reply)]
            replies += self._replies([_copy(message) for message in asked if message.metadata.dst_node_id in lost])
        return replies

    def _replies(self, messages: Iterable[Message]) -> list[Message]:
        waiting, replies = set(self.push_messages(messages)), list[Message]()
        while waiting:
            self._wait()
            found = list(self.pull_messages(waiting))
            waiting -= {reply.metadata.reply_to_message_id for reply in found}
            replies += found
        return replies

    def _wait(self) -> None:
        if self._running.done():
            self._ended()
        time.sleep(_POLL)

    def _ended(self) -> NoReturn:
        reason = self._running.exception()
        raise AntherError(f"grid=ray: Flower's simulation has ended: {reason}: see above") from reason


def _died(reply: Message) -> bool:
    """Whether it is the runtime's word for an actor that died: what goes wrong on a device has a code of its own."""
    return reply.has_error() and reply.error.code == ErrorCode.UNKNOWN


def _copy(message: Message) -> Message:
    return Message(message.content, message.metadata.dst_node_id, message.metadata.message_type)


def _run(server: ServerApp, client: ClientApp, devices: int, *, gpu: bool) -> None:
    """Flower's simulation, from the start of Ray to its end."""
    backend: dict[str, Any] = {
        "client_resources": {
            "num_cpus": 1,
            "num_gpus": int(gpu),
            "max_restarts": -1,
        },  # Ray gets all of them as an actor's options
        "init_args": {"address": "local", "include_dashboard": False, "logging_level": "ERROR"},
    }
    run_simulation(server, client, devices, backend_config=backend)


def _abandon_jobs() -> None:
    """End the processes that are at jobs which nobody waits for any more; a single one may take minutes."""
    logging.getLogger("flwr").setLevel(logging.CRITICAL)  # it would tell of each at length
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error, IndexError):  # it has ended by itself
            if process.cmdline()[0].startswith("ray::ClientAppActor"):
                process.kill()


def _client(config: SimulationConfig, folder: Path, memory: int) -> ClientApp:
    """The ClientApp of all devices: it travels to Ray's processes with every message, so it holds text only."""
    app = ClientApp()
    answer = functools.partial(_answer, strict_json.dumps(config), str(folder.absolute()), memory)
    for register in (app.query(), app.train(), app.train("personalise"), app.evaluate()):
        register(answer)
    return app


def _answer(config: str, folder: str, memory: int, message: Message, context: Context) -> Message:
    """Reply for the device of this partition; whatever goes wrong is its own error."""
    try:
        people, perform = _world(config, folder, memory)
        device = people[int(context.node_config[PARTITION_ID_KEY])].device
        outcome = run_handlers({"": handle(parse_request(message), device)}, perform)[""]
    except Exception as error:
        outcome = error
    return reply_message(outcome, message)


@functools.lru_cache(maxsize=1)
def _world(config: str, folder: str, memory: int) -> tuple[list[Participant], Perform]:
    """Everybody, and who performs their jobs: made once in each process, which has one core to itself."""
    import ray  # not this module: where there is none, the rest of it can still be imported

    torch.set_num_threads(1)
    settings: SimulationConfig = to_object(OmegaConf.create(strict_json.loads(config)), SimulationConfig)
    base, people, _ = build(settings, Path(folder))
    sharing = int(ray.cluster_resources()["CPU"]) if base.device.type == "cpu" else 1
    return people, make_perform(settings, base, memory // sharing)
