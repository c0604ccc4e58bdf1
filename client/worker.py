"""The process that holds the base: it answers one request after another, and ends when none comes for a while.

`client.run` listens, and starts it when somebody connects: what it held is given back to the system whole, and a
worker that was killed is there again with the next request. It is the only process that opens the store.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping
from types import FrameType

from client import answering, line
from conf.errors import AntherError
from privacy.policy import Refusal

log = logging.getLogger("client.worker")

LISTEN, STATED = "ANTHER_LISTEN_FD", "ANTHER_NODE"
"""The listening socket's number, and the node's configuration as JSON (`client.device.from_config`)."""


class Stopped(BaseException):
    """A signal came."""


def main() -> int:
    """Answer on the socket that was handed down until nobody has asked for `idle-seconds`."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr)
    stated: dict[str, object] = json.loads(os.environ[STATED])
    signal.signal(signal.SIGTERM, _stop)
    with socket.socket(fileno=int(os.environ[LISTEN])) as listener:
        try:
            serve(listener, stated)
        except Stopped:
            log.info("stopped")
    return 0


def serve(listener: socket.socket, stated: Mapping[str, object]) -> None:
    """Answer whoever connects, one after the other."""
    threads = stated.get("threads")
    if threads is not None:
        import torch

        torch.set_num_threads(int(str(threads)))
    listener.settimeout(float(str(stated.get("idle-seconds", 300.0))))
    while True:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            return
        with connection:
            connection.settimeout(None)
            _answer(connection, stated)


def _answer(connection: socket.socket, stated: Mapping[str, object]) -> None:
    if not line.same_user(connection):
        log.warning("another user connected, and was not answered")
        return
    try:
        asked = line.hear(connection)
    except (OSError, ValueError, KeyError, AntherError) as error:
        log.warning("a request could not be read: %s", error)
        return
    outcome = answering.answer(asked.request, asked.overrides, stated)
    try:
        line.tell(connection, _told(asked, outcome))
    except OSError as error:  # what was sealed is sent when it is asked for again
        log.warning("whoever asked is gone: %s", error)


def _told(asked: line.Asked, outcome: object) -> line.Answered:
    """A refusal may be told; other exceptions can name the owner's files, so their text stays in this log."""
    if not isinstance(outcome, Exception):
        return line.Answered(reply=outcome)  # type: ignore[arg-type]
    unforeseen = None if isinstance(outcome, AntherError) else outcome
    log.error("could not answer %s: %s", type(asked.request).__name__, outcome, exc_info=unforeseen)
    if isinstance(outcome, Refusal):
        return line.Answered(refused=str(outcome))
    return line.Answered(failed=type(outcome).__name__)


def _stop(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise Stopped


if __name__ == "__main__":
    sys.exit(main())
