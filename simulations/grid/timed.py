"""A fleet that lives: the grid in one process on a virtual clock, where training takes devices time, power and memory.

The server gets what a real one would: a reply at the moment at which it would come, or none. Who was killed for want
of memory, ran flat, was taken up by its owner or just vanished is in the fleet's own log. Querying, measuring and
personalising are how a simulation looks at its devices: they answer at once, and it costs them nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice

from flwr.app import Message

from client.app import parse_request, reply_message
from client.device import Device
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
    """A `CohortGrid` whose devices need time to train, and may not get done.

    Jobs are trained once the first of their replies is due, together with all that are under way by then and will get
    done: those of devices that break off are never trained.

    Args:
        lives: of the devices.
        costs: of plans.
        seed: of the drop-outs.
    """

    def __init__(
        self,
        devices: Sequence[Device],
        perform: Perform,
        *,
        lives: VirtualFleet,
        costs: Costs,
        seed: int,
        together: bool = True,
        storage: GroupCommit = commit_each_write,
    ) -> None:
        super().__init__(devices, perform, together=together, storage=storage)
        self._lives, self._costs, self._seed = lives, costs, seed
        self._asked: dict[str, Message] = {}  # to train, by message id, until there is a reply
        self._forgotten: set[str] = set()  # of them: whose reply nobody is going to pull
        self._pending: dict[str, None] = {}  # of them, in order: who will get done, and isn't trained yet
        self._outcomes: dict[str, Reply | Exception] = {}  # trained, and on their way

    def get_node_ids(self) -> Iterable[int]:
        """Those that are on."""
        now = self._lives.clock.now()
        return [node for node, device in self._devices.items() if not self._lives.fleet[device.name].at(now).off]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Have devices train, one thing after another; whatever else is asked of them they answer at once."""
        asked = list(messages)
        for message in asked:
            set_message_id(message, str(next(self._numbers)))
            owned, name = self._owned(message), message.metadata.message_id
            if message.metadata.message_type != TRAIN:
                self._replies[name] = reply_message(self._converse([message])[0], message)
                continue
            self._asked[name] = message
            owned.waiting.append(name)
            if not owned.task:
                self._begin(owned)
        return [message.metadata.message_id for message in asked]

    def forget(self, message_ids: Iterable[str]) -> None:
        names = set(message_ids)
        super().forget(names)
        self._forgotten |= names & self._asked.keys()

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Replies as they come, until there is one to each message or `timeout` seconds of the fleet's are over."""
        asked = list(messages)
        if not any(message.metadata.message_type == TRAIN for message in asked):
            return super().send_and_receive(asked)
        clock = self._lives.clock
        return collect(self, asked, clock, until=clock.now() + (math.inf if timeout is None else timeout))

    def _begin(self, owned: VirtualDevice) -> None:
        """A device receives its next message and trains; what is to become of that is known as soon as it begins."""
        now = self._lives.clock.now()
        owned.state = owned.at(now)
        owned.task = Task(name=owned.waiting.popleft(), began=now)
        try:
            request = parse_request(self._asked[owned.task.name])
        except RequestRefusedError as refused:
            return self._reply(owned, refused)
        assert isinstance(request, Train)
        plan, profile = request.plan, owned.hardware.profile
        if owned.state.off:
            return self._lose(owned, OFF)
        arrived = owned.run_phase(until=now + len(request.adapter) * MEGABITS / profile.downlink_mbps)
        if arrived.abort_reason:
            return self._lose(owned, arrived.abort_reason)
        if not self._costs.fits(plan, owned.hardware.known):
            return self._lose(owned, KILLED)
        vanishes = owned.state.time + self._lasts(owned, plan.round)
        done = owned.run_phase(until=vanishes, work=owned.hardware.seconds(plan, self._costs))
        if done.abort_reason or done.left:
            return self._lose(owned, done.abort_reason or DROPPED)
        self._pending[owned.task.name] = None
        return self._lives.clock.at(done.state.time, partial(self._send, owned))

    def _lasts(self, owned: VirtualDevice, round: int) -> float:
        """Seconds until it vanishes, if it doesn't get done before: at a constant rate, so that each hour is alike."""
        rate = owned.hardware.profile.drop_out
        drawn = 1.0 - uniform(self._seed, owned.name, round, "drop-out")
        return HOUR * math.log(drawn) / math.log(1.0 - rate) if rate else math.inf

    def _send(self, owned: VirtualDevice) -> bool:
        """What was trained goes up: so many bytes, over this link."""
        assert owned.task is not None
        name = owned.task.name
        if name not in self._outcomes:
            self._train(name)
        outcome = self._outcomes.pop(name)
        if not isinstance(outcome, Update):
            self._reply(owned, outcome)
            return False
        link = owned.hardware.profile.uplink_mbps
        sent: AdvanceResult = owned.run_phase(until=owned.state.time + len(outcome.adapter) * MEGABITS / link)
        if sent.abort_reason:
            self._lose(owned, sent.abort_reason)
        else:
            took = sent.state.time - owned.task.began
            self._reply(owned, replace(outcome, seconds=took, joules=owned.task.joules))
        return False

    def _train(self, due: str) -> None:
        """Train what is due, and with it what else is under way, a wave of it."""
        del self._pending[due]
        wave = [due, *islice(self._pending, self._wave - 1)]
        outcomes = self._converse([self._asked[name] for name in wave])
        self._outcomes |= zip(wave, outcomes.values(), strict=True)
        for name in wave[1:]:
            del self._pending[name]

    def _reply(self, owned: VirtualDevice, outcome: Reply | Exception) -> None:
        """The task is over with this, when the device is."""
        self._lives.clock.at(owned.state.time, partial(self._over, owned, outcome))

    def _lose(self, owned: VirtualDevice, reason: str) -> None:
        """The task is over, and nobody hears of it."""
        self._lives.clock.at(owned.state.time, partial(self._over, owned, None, reason))

    def _over(self, owned: VirtualDevice, outcome: Reply | Exception | None, reason: str = "") -> bool:
        task, owned.task = owned.task, None
        assert task is not None
        message = self._asked.pop(task.name)
        self._lives.log.spent(task.joules, drained=task.drained)
        if outcome is None:
            self._lives.log.lost(reason)
        elif task.name not in self._forgotten:
            self._replies[task.name] = reply_message(outcome, message)
        self._forgotten.discard(task.name)
        if owned.waiting:
            self._begin(owned)
        return outcome is not None

    def _converse(self, wave: Sequence[Message]) -> dict[int, Reply | Exception]:
        """As of every cohort; a device's report says how it is now."""
        now = self._lives.clock.now()
        return {
            place: self._owned(wave[place]).report(outcome, now) if isinstance(outcome, DeviceReport) else outcome
            for place, outcome in super()._converse(wave).items()
        }

    def _owned(self, message: Message) -> VirtualDevice:
        return self._lives.fleet[self._devices[message.metadata.dst_node_id].name]
