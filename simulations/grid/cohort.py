"""Flower's Grid in one process: many devices behind one `perform`, so that their jobs can share passes.

Messages are made, checked and read exactly as in deployment; only the network is missing.
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

from client.app import parse_request, reply_message
from client.device import Device
from client.rounds.handler import handle
from client.rounds.scheduler import RequestHandler, run_handlers
from protocol.messages import Reply
from training.jobs import Job, Result

Perform = Callable[[list[Job]], Sequence[Result | Exception]]
GroupCommit = Callable[[], AbstractContextManager[Callable[[], None]]]

WAVE = 512
"""Conversations that are driven at once. Whoever asks ten thousand devices holds the pictures, examples and replies of
this many; a pass through the base is full with far fewer."""


@contextmanager
def commit_each_write() -> Iterator[Callable[[], None]]:
    """For devices whose every write is durable when it returns: there is nothing to commit."""
    yield lambda: None


def set_message_id(message: Message, name: str) -> Message:
    """As Flower's own grids do when they push it: there is no setter."""
    message.metadata.__dict__["_message_id"] = name
    return message


class InProcessGrid(Grid):
    """What every grid without a network is: Flower's own bookkeeping, done here."""

    def __init__(self) -> None:
        self._run = Run.create_empty(run_id=1)
        # Flower sets these in the process that it starts for a ServerApp; without them no Message can be made.
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
    """A fleet of devices, with node ids 1, 2, … in the order of their names.

    Args:
        perform: runs jobs, `training.engine.perform` on some base.
        together: hand the jobs of many messages to `perform` at once; False: one client at a time.
        storage: `simulations.fleet.storage.Database.together` of the storage that the devices share. What they reserve is
            committed before their jobs are performed, and what they seal before a reply is handed out.
    """

    def __init__(
        self,
        devices: Sequence[Device],
        perform: Perform,
        *,
        together: bool = True,
        storage: GroupCommit = commit_each_write,
    ) -> None:
        super().__init__()
        ordered = sorted(devices, key=lambda device: device.name)
        self._devices = dict(enumerate(ordered, start=1))
        self._perform, self._storage = perform, storage
        self._wave = WAVE if together else 1
        self._numbers = count(1)
        self._replies: dict[str, Message] = {}

    def get_node_ids(self) -> Iterable[int]:
        return list(self._devices)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Have the devices answer; their replies wait to be pulled."""
        pushed = []
        for identifier, reply in self._answers(messages):
            self._replies[identifier] = reply
            pushed.append(identifier)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(identifier) for identifier in message_ids if identifier in self._replies]

    def forget(self, message_ids: Iterable[str]) -> None:
        """Nobody pulls the replies to these."""
        for identifier in message_ids:
            self._replies.pop(identifier, None)

    def send_and_receive(
        self,
        messages: Iterable[Message],
        *,
        timeout: float | None = None,  # noqa: ARG002  # Flower's interface
    ) -> Iterable[Message]:
        """Replies to all messages; nothing is ever late, so the timeout has no meaning.

        Devices answer as their replies are read: no more than a wave of them is ever held.
        """
        return (reply for _, reply in self._answers(messages))

    def _answers(self, messages: Iterable[Message]) -> Iterator[tuple[str, Message]]:
        """(message id, reply) for every message, a wave at a time."""
        waiting = iter(messages)
        while wave := list(islice(waiting, self._wave)):
            for message in wave:
                set_message_id(message, str(next(self._numbers)))
            outcomes = self._converse(wave)
            for place, message in enumerate(wave):  # each outcome is let go of as it is handed out
                yield message.metadata.message_id, reply_message(outcomes.pop(place), message)

    def _converse(self, wave: Sequence[Message]) -> dict[int, Reply | Exception]:
        """What each device came to, by its place in the wave, once all that the devices wrote is durable."""
        with self._storage() as commit:

            def perform(jobs: list[Job]) -> Sequence[Result | Exception]:
                commit()  # no job is performed before its charge is on the disk
                return self._perform(jobs)

            return run_handlers({place: self._conversation(message) for place, message in enumerate(wave)}, perform)

    def _conversation(self, message: Message) -> RequestHandler:
        """As on a device: a request that can't be read is that node's error, and nobody else's."""
        return (yield from handle(parse_request(message), self._devices[message.metadata.dst_node_id]))
