"""Flower's Grid in one process: many devices behind one `perform`, so that their jobs can share passes.

Messages are made, checked and read exactly as in deployment; only the network is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import count

from flwr.app import Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from client.app import reply_message
from client.device import Device
from client.drive import drive
from client.logic import handle
from protocol import records
from training.jobs import Job, Result

Perform = Callable[[list[Job]], Sequence[Result | Exception]]


class InProcessGrid(Grid):
    """A fleet of devices, with node ids 1, 2, … in the order of their names.

    Args:
        perform: runs jobs, `training.engine.perform` on some base.
        cohort: hand the jobs of all messages pushed together to `perform` at once; False: one client at a time.
    """

    def __init__(self, devices: Sequence[Device], perform: Perform, *, cohort: bool) -> None:
        ordered = sorted(devices, key=lambda device: device.name)
        self._devices = dict(enumerate(ordered, start=1))
        self._perform, self._cohort = perform, cohort
        self._numbers = count(1)
        self._replies: dict[str, Message] = {}
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

    def get_node_ids(self) -> Iterable[int]:
        return list(self._devices)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Have the devices answer; their replies wait to be pulled."""
        pushed: dict[str, Message] = {}
        for message in messages:
            identifier = str(next(self._numbers))
            message.metadata.__dict__["_message_id"] = identifier  # as Flower's own grids do: it has no setter
            pushed[identifier] = message
        groups = [pushed] if self._cohort else [{identifier: message} for identifier, message in pushed.items()]
        for group in groups:
            self._answer(group)
        return list(pushed)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(identifier) for identifier in message_ids if identifier in self._replies]

    def send_and_receive(
        self,
        messages: Iterable[Message],
        *,
        timeout: float | None = None,  # noqa: ARG002  # Flower's interface
    ) -> Iterable[Message]:
        """Replies to all messages; nothing is ever late, so the timeout has no meaning."""
        return self.pull_messages(self.push_messages(messages))

    def _answer(self, group: dict[str, Message]) -> None:
        conversations = {}
        for identifier, message in group.items():
            request = records.request_from_records(message.metadata.message_type, message.content)
            conversations[identifier] = handle(request, self._devices[message.metadata.dst_node_id])
        for identifier, outcome in drive(conversations, self._perform).items():
            self._replies[identifier] = reply_message(outcome, group[identifier])
