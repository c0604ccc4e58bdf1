"""Flower's Grid in one process: many devices share one `perform`, so that their jobs can share passes.

Messages are built, checked and parsed exactly as in deployment; only the network is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import count, islice

from flwr.app import Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from client.device import Device
from client.rounds.handler import handle
from client.rounds.scheduler import RequestHandler, run_handlers
from client.runtime.client_app import parse_request, reply_message
from protocol.messages import Reply
from training.jobs import Job, Result

Perform = Callable[[list[Job]], Sequence[Result | Exception]]
GroupCommit = Callable[[], AbstractContextManager[Callable[[], None]]]

MAX_BATCH = 512
"""Maximum number of requests that are handled together. Only the pictures, examples and replies of these devices are in
memory at the same time, and far fewer devices already fill a pass through the base."""


@contextmanager
def commit_each_write() -> Iterator[Callable[[], None]]:
    """Group commit without effect, for storage whose writes are durable when they return."""
    yield lambda: None


def set_message_id(message: Message, message_id: str) -> Message:
    """Set a message's id, as Flower's own grids do on push; messages have no setter for it."""
    message.metadata.__dict__["_message_id"] = message_id
    return message


class InProcessGrid(Grid):
    """Base class of grids without a network; does Flower's bookkeeping."""

    def __init__(self) -> None:
        self._run = Run.create_empty(run_id=1)
        # Flower sets these in the process that it starts for a ServerApp. Message can't be created without them.
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = self._run.run_id, 1, SUPERLINK_NODE_ID

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)


class CohortGrid(InProcessGrid):
    """Grid of a fleet of devices, with consecutive node ids in the order of their names.

    Args:
        devices: the fleet.
        perform: runs jobs; `training.engine.perform` on some base.
        batched: pass the jobs of many devices to `perform` in one call; False: those of one device per call.
        group_commit: `simulations.fleet.storage.Database.group_commit` of the devices' shared storage. Ledger
            reservations are committed before the jobs are performed, sealed replies before a reply is returned.
        first_node: first node id.
    """

    def __init__(
        self,
        devices: Sequence[Device],
        perform: Perform,
        *,
        batched: bool = True,
        group_commit: GroupCommit = commit_each_write,
        first_node: int = 1,
    ) -> None:
        super().__init__()
        ordered = sorted(devices, key=lambda device: device.name)
        self._devices = dict(enumerate(ordered, start=first_node))
        self._perform, self._group_commit = perform, group_commit
        self._max_batch = MAX_BATCH if batched else 1
        self._message_ids = count(1)
        self._replies: dict[str, Message] = {}

    def get_node_ids(self) -> Iterable[int]:
        return list(self._devices)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Have the devices answer and keep their replies until they are pulled."""
        pushed = []
        for message_id, reply in self._answer_all(messages):
            self._replies[message_id] = reply
            pushed.append(message_id)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(message_id) for message_id in message_ids if message_id in self._replies]

    def forget(self, message_ids: Iterable[str]) -> None:
        """Drop the replies to these messages, which will not be pulled.

        `server.rounds.collect` requires this method of grids that keep replies.
        """
        for message_id in message_ids:
            self._replies.pop(message_id, None)

    def send_and_receive(
        self,
        messages: Iterable[Message],
        *,
        timeout: float | None = None,  # noqa: ARG002  # Flower's interface
    ) -> Iterable[Message]:
        """Return the replies to all messages; none is ever late, so the timeout has no effect.

        Devices answer lazily while the replies are iterated: at most `MAX_BATCH` replies are in memory.
        """
        return (reply for _, reply in self._answer_all(messages))

    def _answer_all(self, messages: Iterable[Message]) -> Iterator[tuple[str, Message]]:
        """Yield (message id, reply) for every message, batch by batch."""
        remaining = iter(messages)
        while batch := list(islice(remaining, self._max_batch)):
            for message in batch:
                set_message_id(message, str(next(self._message_ids)))
            outcomes = self._converse(batch)
            for index, message in enumerate(batch):  # pop: each outcome is freed once it was returned
                yield message.metadata.message_id, reply_message(outcomes.pop(index), message)

    def _converse(self, batch: Sequence[Message]) -> dict[int, Reply | Exception]:
        """Return each device's reply or error by its index in the batch, once all writes of the devices are durable."""
        with self._group_commit() as commit:

            def perform(jobs: list[Job]) -> Sequence[Result | Exception]:
                commit()  # no job runs before its ledger reservation is on disk
                return self._perform(jobs)

            return run_handlers({index: self._conversation(message) for index, message in enumerate(batch)}, perform)

    def _conversation(self, message: Message) -> RequestHandler:
        """Handle a message as on a device: an unreadable request is an error of this node only."""
        return (yield from handle(parse_request(message), self._devices[message.metadata.dst_node_id]))
