"""In-process grid on a virtual clock, where training takes simulated time, energy and memory.

As with a real fleet, the server receives replies at the time at which they would arrive, or none. The cause of a
missing reply (out of memory, empty battery, the owner uses the device, dropout) is in the fleet's log only. Query,
evaluation and personalization are the simulation's own measurements: they are answered at once and cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice

from flwr.app import Message

from client.device import Device
from client.runtime.client_app import parse_request, reply_message
from common.units import HOUR, MEGABITS
from privacy.policy import RequestRefusedError
from protocol.messages import DeviceReport, Reply, Train, Update
from protocol.records import TRAIN
from server.rounds.collect import collect
from simulations.fleet.availability import uniform
from simulations.fleet.costs import Costs
from simulations.fleet.device_model import AdvanceResult
from simulations.fleet.outcomes import DROPPED, KILLED, OFF
from simulations.fleet.virtual_device import Task, VirtualDevice
from simulations.fleet.virtual_fleet import VirtualFleet
from simulations.grid.cohort import CohortGrid, GroupCommit, Perform, commit_each_write, set_message_id


class TimedGrid(CohortGrid):
    """A `CohortGrid` whose devices need time to train and may fail.

    A job is trained when the first reply is due, together with all running jobs that will complete. Jobs of devices
    that fail are never trained.

    Args:
        devices: the fleet.
        perform: see `CohortGrid`.
        fleet: state of the devices.
        costs: memory and time of plans.
        seed: seed of dropouts.
        batched: see `CohortGrid`.
        group_commit: see `CohortGrid`.
    """

    def __init__(
        self,
        devices: Sequence[Device],
        perform: Perform,
        *,
        fleet: VirtualFleet,
        costs: Costs,
        seed: int,
        batched: bool = True,
        group_commit: GroupCommit = commit_each_write,
    ) -> None:
        super().__init__(devices, perform, batched=batched, group_commit=group_commit)
        self._fleet, self._costs, self._seed = fleet, costs, seed
        self._asked: dict[str, Message] = {}  # Train messages without a reply, by message id
        self._forgotten: set[str] = set()  # ids of messages whose reply will not be pulled
        self._pending: dict[str, None] = {}  # ordered set of ids of jobs that will complete, before training
        self._outcomes: dict[str, Reply | Exception] = {}  # trained, but not sent yet

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the devices that are on."""
        now, states = self._fleet.clock.now(), self._fleet.devices
        return [node for node, client in self._devices.items() if not states[client.name].state_at(now).off]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue Train messages on their devices; answer all others at once."""
        sent = list(messages)
        for message in sent:
            set_message_id(message, str(next(self._message_ids)))
            device, message_id = self._device_of(message), message.metadata.message_id
            if message.metadata.message_type != TRAIN:
                self._replies[message_id] = reply_message(self._converse([message])[0], message)
                continue
            self._asked[message_id] = message
            device.waiting.append(message_id)
            if not device.task:
                self._start_task(device)
        return [message.metadata.message_id for message in sent]

    def forget(self, message_ids: Iterable[str]) -> None:
        forgotten = set(message_ids)
        super().forget(forgotten)
        self._forgotten |= forgotten & self._asked.keys()

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Yield replies as they arrive, until all have arrived or `timeout` seconds on the fleet's clock have
        passed."""
        sent = list(messages)
        if not any(message.metadata.message_type == TRAIN for message in sent):
            return super().send_and_receive(sent)
        clock = self._fleet.clock
        return collect(self, sent, clock, until=clock.now() + (math.inf if timeout is None else timeout))

    def _start_task(self, device: VirtualDevice) -> None:
        """Start a device's next task; download and training are computed at once, and their end is scheduled."""
        now = self._fleet.clock.now()
        device.state = device.state_at(now)
        device.task = Task(message_id=device.waiting.popleft(), started=now)
        try:
            request = parse_request(self._asked[device.task.message_id])
        except RequestRefusedError as refusal:
            return self._reply(device, refusal)
        assert isinstance(request, Train)
        plan, profile = request.plan, device.hardware.profile
        if device.state.off:
            return self._lose_task(device, OFF)
        downloaded = device.run_phase(until=now + len(request.adapter) * MEGABITS / profile.downlink_mbps)
        if downloaded.abort_reason:
            return self._lose_task(device, downloaded.abort_reason)
        if not self._costs.fits(plan, device.hardware.known_device):
            return self._lose_task(device, KILLED)
        drops_out = device.state.time + self._seconds_until_dropout(device, plan.round)
        trained = device.run_phase(until=drops_out, work=device.hardware.seconds(plan, self._costs))
        if trained.abort_reason or trained.remaining_work:
            return self._lose_task(device, trained.abort_reason or DROPPED)
        self._pending[device.task.message_id] = None
        return self._fleet.clock.schedule(trained.state.time, partial(self._send_update, device))

    def _seconds_until_dropout(self, device: VirtualDevice, round: int) -> float:
        """Draw the seconds until the device drops out, at a constant hourly rate; infinity without dropout."""
        rate = device.hardware.profile.dropout_per_hour
        drawn = 1.0 - uniform(self._seed, device.name, round, "drop-out")
        return HOUR * math.log(drawn) / math.log(1.0 - rate) if rate else math.inf

    def _send_update(self, device: VirtualDevice) -> bool:
        """Upload the trained update over the device's link."""
        assert device.task is not None
        message_id = device.task.message_id
        if message_id not in self._outcomes:
            self._train(message_id)
        outcome = self._outcomes.pop(message_id)
        if not isinstance(outcome, Update):
            self._reply(device, outcome)
            return False
        link = device.hardware.profile.uplink_mbps
        uploaded: AdvanceResult = device.run_phase(until=device.state.time + len(outcome.adapter) * MEGABITS / link)
        if uploaded.abort_reason:
            self._lose_task(device, uploaded.abort_reason)
        else:
            seconds = uploaded.state.time - device.task.started
            self._reply(device, replace(outcome, seconds=seconds, joules=device.task.joules))
        return False

    def _train(self, due_id: str) -> None:
        """Train the job that is due, together with a batch of other pending jobs."""
        del self._pending[due_id]
        batch = [due_id, *islice(self._pending, self._max_batch - 1)]
        outcomes = self._converse([self._asked[message_id] for message_id in batch])
        self._outcomes |= zip(batch, outcomes.values(), strict=True)
        for message_id in batch[1:]:
            del self._pending[message_id]

    def _reply(self, device: VirtualDevice, outcome: Reply | Exception) -> None:
        """Schedule the end of the task with this outcome."""
        self._fleet.clock.schedule(device.state.time, partial(self._finish_task, device, outcome))

    def _lose_task(self, device: VirtualDevice, cause: str) -> None:
        """Schedule the end of the task without a reply."""
        self._fleet.clock.schedule(device.state.time, partial(self._finish_task, device, None, cause))

    def _finish_task(self, device: VirtualDevice, outcome: Reply | Exception | None, cause: str = "") -> bool:
        task, device.task = device.task, None
        assert task is not None
        message = self._asked.pop(task.message_id)
        self._fleet.log.add_energy(task.joules, drained=task.drained)
        if outcome is None:
            self._fleet.log.add_lost(cause)
        elif task.message_id not in self._forgotten:
            self._replies[task.message_id] = reply_message(outcome, message)
        self._forgotten.discard(task.message_id)
        if device.waiting:
            self._start_task(device)
        return outcome is not None

    def _converse(self, batch: Sequence[Message]) -> dict[int, Reply | Exception]:
        """Converse as in `CohortGrid`; device reports contain the device's current state."""
        now = self._fleet.clock.now()
        return {
            index: self._device_of(batch[index]).report(outcome, now) if isinstance(outcome, DeviceReport) else outcome
            for index, outcome in super()._converse(batch).items()
        }

    def _device_of(self, message: Message) -> VirtualDevice:
        return self._fleet.devices[self._devices[message.metadata.dst_node_id].name]
