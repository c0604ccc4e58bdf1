"""Worker process with the loaded base. It answers one request after another, and ends after an idle time.

`client.runtime.supervisor` listens on the socket, and starts the worker when a request arrives. At its end all of its
memory returns to the system, and a worker that was killed is replaced at the next request. It is the only process that
opens the store, and the owner's throttle controls everything that it trains.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from dataclasses import dataclass, field
from types import FrameType

from client.device import WATTS
from client.paths import device_files
from client.power.meter import Meter
from client.power.sensors import choose_sensors
from client.runtime import ipc, request_handler
from client.runtime.request_handler import WorkerResources
from client.runtime.throttle import Throttle
from client.store.open import open_store
from common import strict_json
from common.errors import AntherError
from common.plugins import allow_plugins
from common.service import SignalReceived
from conf.schemas.node import NodeConfig
from models.base.base import resolve_device
from privacy.policy import RequestRefusedError
from protocol.messages import Evaluate, Evaluation, Personalize, Personalized, Request, Train, Update
from training.jobs import Cancelled

log = logging.getLogger("client.runtime.worker")

LISTEN, NODE, BASE = "ANTHER_LISTEN_FD", "ANTHER_NODE", "ANTHER_BASE_HELD"
"""Environment variables: the listening socket's descriptor, the configuration as JSON, the base's hash or path."""

USAGE = 2


def main() -> int:
    """Answer requests on the inherited socket until none arrives for `worker.idle_seconds`."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr)
    node = strict_json.from_plain(NodeConfig, strict_json.loads(os.environ[NODE]))
    allow_plugins(node.allowed_plugins)
    try:
        with (
            open_store(
                device_files(str(node.name), node.store), encrypt=node.storage.encrypt, federation=node.federation
            ) as opened,
            socket.socket(fileno=int(os.environ[LISTEN])) as listener,
        ):
            sensors = choose_sensors(node.power, cuda=resolve_device(node.device) == "cuda")
            meter = Meter(sensors.source, watts=WATTS)
            throttle = Throttle(node.throttle, sensors.read, pausing=meter.paused)
            resources = WorkerResources(store=opened.store, read=sensors.read, meter=meter, throttle=throttle)
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
    """Server that answers requests one at a time."""

    stated: dict[str, object]
    resources: WorkerResources
    _answering: bool = field(default=False, init=False)

    def serve(self, listener: socket.socket, node: NodeConfig) -> None:
        """Answer each connection in turn."""
        if node.worker.threads is not None:
            import torch

            torch.set_num_threads(node.worker.threads)
        listener.settimeout(node.worker.idle_seconds)
        while not self.resources.throttle.stop.is_set():
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
            log.warning("a connection from another user was rejected")
            return
        try:
            request = ipc.recv_request(connection)
        except (OSError, ValueError, KeyError, AntherError) as error:
            log.warning("a request could not be read: %s", error)
            return
        outcome = request_handler.answer(request, self.stated, resources=self.resources)
        try:
            try:
                ipc.send_response(connection, _response(request, outcome))
            except ValueError as error:  # a non-finite number: JSON has none, and nothing was sent
                log.error("could not answer %s: %s", type(request).__name__, error)
                ipc.send_response(connection, ipc.WorkerResponse())
        except OSError as error:  # a sealed reply is sent when it is requested again
            log.warning("the requester has disconnected: %s", error)

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Handle SIGTERM: training stops before its next step with a reply; without a request, end now."""
        del number, frame
        self.resources.throttle.stop.set()
        if not self._answering:
            raise SignalReceived


def stated(node: NodeConfig, base: str) -> dict[str, object]:
    """Return the configuration in the form that `client.device.from_config` reads."""
    values = {
        "base": base,
        "data": node.data,
        "background": node.background,
        "caption": node.caption,
        "flip": node.flip or None,
        "caption-dropout": node.caption_dropout or None,
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
    return {key: value for key, value in values.items() if value is not None}


def _response(request: Request, outcome: object) -> ipc.WorkerResponse:
    """Convert an outcome for the requester; only a refusal includes its reason.

    Other exceptions can depend on the pictures, so their text stays in this log.
    """
    if not isinstance(outcome, Exception):
        if summary := _summary(request, outcome):
            log.info("%s", summary)
        return ipc.WorkerResponse(reply=outcome)  # type: ignore[arg-type]
    if isinstance(outcome, Cancelled):  # the exact reason stays on the device
        return ipc.WorkerResponse(refused="not now: the device is in use, or low on battery or memory")
    unforeseen = None if isinstance(outcome, AntherError) else outcome
    log.error("could not answer %s: %s", type(request).__name__, outcome, exc_info=unforeseen)
    if isinstance(outcome, RequestRefusedError):
        return ipc.WorkerResponse(refused=str(outcome))
    return ipc.WorkerResponse()


def _summary(request: Request, reply: object) -> str | None:
    """Describe the completed work for the owner's log; None for requests that aren't logged."""
    match request, reply:
        case Train(plan=plan), Update():
            text = f"trained {plan.steps} steps for round {plan.round}, sent {_size(len(reply.adapter))}"
            return text if reply.epsilon is None else f"{text}; total privacy cost ε={reply.epsilon:.3g}"
        case Evaluate(), Evaluation(gain=None):
            return f"measured the adapter of round {request.round} on its pictures, sent two losses"
        case Evaluate(), Evaluation():
            return f"measured the adapter of round {request.round} on its pictures, sent a noised gain"
        case Personalize(), Personalized():
            return f"the personal adapter of round {request.round} is ready; it stays on this device"
    return None


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


if __name__ == "__main__":
    sys.exit(main())
