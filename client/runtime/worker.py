"""The process that holds the base: it answers one request after another, and ends when none comes for a while.

`client.runtime.supervisor` listens, and starts it when somebody connects: what it held is given back to the system whole, and a
worker that was killed is there again with the next request. It is the only process that opens the store, and its
owner's guard stands before all that it trains.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from dataclasses import dataclass, field
from types import FrameType

from client.cli.paths import device_files
from client.device import WATTS
from client.power.meter import Meter
from client.power.sensors import choose_sensors
from client.runtime import ipc, request_handler
from client.runtime.request_handler import WorkerResources
from client.runtime.throttle import Guard
from client.store.open import open_store
from common import strict_json
from common.errors import AntherError
from common.service import SignalReceived
from conf.schemas.node import NodeConfig
from models.base.base import resolve_device
from privacy.policy import RequestRefusedError
from protocol.messages import Evaluate, Evaluation, Personalize, Personalized, Request, Train, Update
from training.jobs import Cancelled

log = logging.getLogger("client.runtime.worker")

LISTEN, NODE, BASE = "ANTHER_LISTEN_FD", "ANTHER_NODE", "ANTHER_BASE_HELD"
"""The listening socket's number; the node's configuration, as JSON; and the base that is held, by hash or path."""

USAGE = 2


def main() -> int:
    """Answer on the socket that was handed down until nobody has asked for `worker.idle_seconds`."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr)
    node = strict_json.from_plain(NodeConfig, strict_json.loads(os.environ[NODE]))
    try:
        with (
            open_store(
                device_files(str(node.name), node.store), encrypt=node.storage.encrypt, federation=node.federation
            ) as found,
            socket.socket(fileno=int(os.environ[LISTEN])) as listener,
        ):
            sensors = choose_sensors(node.power, cuda=resolve_device(node.device) == "cuda")
            meter = Meter(sensors.source, watts=WATTS)
            guard = Guard(node.throttle, sensors.read, pausing=meter.paused)
            resources = WorkerResources(store=found.store, read=sensors.read, meter=meter, guard=guard)
            log.info("energy: %s", f"{sensors.name}, {sensors.covers}" if sensors.source else sensors.covers)
            worker = WorkerServer(stated(node, os.environ[BASE]), resources)
            signal.signal(signal.SIGTERM, worker.stop)
            worker.serve(listener, node)
    except AntherError as error:
        log.error("%s", error)
        return USAGE
    except SignalReceived:
        log.info("stopped")
    return 0


@dataclass
class WorkerServer:
    """Answers with what it holds."""

    stated: dict[str, object]
    resources: WorkerResources
    _answering: bool = field(default=False, init=False)

    def serve(self, listener: socket.socket, node: NodeConfig) -> None:
        """Answer whoever connects, one after the other."""
        if node.worker.threads is not None:
            import torch

            torch.set_num_threads(node.worker.threads)
        listener.settimeout(node.worker.idle_seconds)
        while not self.resources.guard.stop.is_set():
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                return
            with connection:
                connection.settimeout(None)
                self._answering = True
                self._answer(connection)
                self._answering = False

    def _answer(self, connection: socket.socket) -> None:
        if not ipc.same_user(connection):
            log.warning("another user connected, and was not answered")
            return
        try:
            request = ipc.recv_request(connection)
        except (OSError, ValueError, KeyError, AntherError) as error:
            log.warning("a request could not be read: %s", error)
            return
        outcome = request_handler.answer(request, self.stated, resources=self.resources)
        try:
            try:
                ipc.tell(connection, _told(request, outcome))
            except ValueError as error:  # a number that JSON has not: nothing of it was sent
                log.error("could not answer %s: %s", type(request).__name__, error)
                ipc.tell(connection, ipc.WorkerResponse())
        except OSError as error:  # what was sealed is sent when it is asked for again
            log.warning("whoever asked is gone: %s", error)

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Training ends before its next step, and whoever asked is told so; without any, at once."""
        del number, frame
        self.resources.guard.stop.set()
        if not self._answering:
            raise SignalReceived


def stated(node: NodeConfig, base: str) -> dict[str, object]:
    """What `client.device.from_config` knows of a device."""
    said = {
        "base": base,
        "data": node.data,
        "background": node.background,
        "name": node.name,
        "store": node.store,
        "weights": node.weights,
        "device": node.device,
        "resolution": node.resolution,
        "checkpointing": node.gradient_checkpointing,
        "rank": node.max_rank,
        "sites": node.sites,
        "previews": node.previews,
        "test": node.test,
        "seed": node.seed if node.test else None,
        "uplink-mbps": node.uplink_mbps,
        "downlink-mbps": node.downlink_mbps,
        "examples-per-second": node.examples_per_second,
        "watts": node.power.watts,
        "memory-gib": node.worker.memory_gib,
    }
    return {key: value for key, value in said.items() if value is not None}


def _told(request: Request, outcome: object) -> ipc.WorkerResponse:
    """A refusal may be told; which other exception it was can depend on the pictures, and stays in this log."""
    if not isinstance(outcome, Exception):
        if said := _said(request, outcome):
            log.info("%s", said)
        return ipc.WorkerResponse(reply=outcome)  # type: ignore[arg-type]
    if isinstance(outcome, Cancelled):  # why is the owner's affair
        return ipc.WorkerResponse(refused="not now: its owner, its battery or its memory comes first")
    unforeseen = None if isinstance(outcome, AntherError) else outcome
    log.error("could not answer %s: %s", type(request).__name__, outcome, exc_info=unforeseen)
    if isinstance(outcome, RequestRefusedError):
        return ipc.WorkerResponse(refused=str(outcome))
    return ipc.WorkerResponse()


def _said(request: Request, reply: object) -> str | None:
    """What was done, for its owner; None: nothing worth a line."""
    match request, reply:
        case Train(plan=plan), Update():
            what = f"trained {plan.steps} steps for round {plan.round}, sent {_size(len(reply.adapter))}"
            return what if reply.epsilon is None else f"{what}; all that was shared comes to ε={reply.epsilon:.3g}"
        case Evaluate(), Evaluation(gain=None):
            return f"measured the adapter of round {request.round} on its pictures, told two losses"
        case Evaluate(), Evaluation():
            return f"measured the adapter of round {request.round} on its pictures, told a noised gain"
        case Personalize(), Personalized():
            return f"the personal adapter of round {request.round} is done; nothing of it was sent"
    return None


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


if __name__ == "__main__":
    sys.exit(main())
