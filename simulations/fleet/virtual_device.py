"""One device of a simulated fleet on its own: how it is now, and what it is at."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from protocol.messages import DeviceReport
from simulations.fleet.availability import Availability
from simulations.fleet.device_model import AdvanceResult, DeviceState, PowerModel, live
from simulations.fleet.hardware import Hardware

WARM = 0.8
"""Share of the way to being hot from which a device says that it is."""


class TaskPhase(NamedTuple):
    """A part of a task, followed from where it began."""

    began: DeviceState
    work: float | None


@dataclass(kw_only=True)
class Task:
    """A device's answer to one message, as far as it has come."""

    name: str
    """The message's id."""
    began: float
    joules: float = 0.0
    drained: float = 0.0
    """Of its battery, joules."""
    phases: list[TaskPhase] = field(default_factory=list)


@dataclass(kw_only=True)
class VirtualDevice:
    """A device in its owner's hands."""

    name: str
    hardware: Hardware
    body: PowerModel
    hours: Availability
    state: DeviceState
    """When it was last at rest."""
    task: Task | None = None
    waiting: deque[str] = field(default_factory=deque)
    """Ids of messages that it is going to answer."""

    def at(self, time: float) -> DeviceState:
        """How it is at a time not before it was last looked at, at rest or at its task."""
        if self.task is None or not self.task.phases:
            self.state = live(self.body, self.hours, self.state, until=time).state
            return self.state
        phases = self.task.phases
        phase = next((phase for phase in reversed(phases) if phase.began.time <= time), phases[0])
        return self._lives(phase.began, until=time, work=phase.work).state

    def run_phase(self, *, until: float = math.inf, work: float | None = None) -> AdvanceResult:
        """The next phase of its task: computing so much, or sending and receiving until a time."""
        assert self.task is not None
        self.task.phases.append(TaskPhase(self.state, work))
        lived = self._lives(self.state, until=until, work=work)
        self.state = lived.state
        self.task.joules += lived.joules
        self.task.drained += lived.drained
        return lived

    def _lives(self, state: DeviceState, *, until: float, work: float | None) -> AdvanceResult:
        leaves = self.hardware.profile.leaves
        return live(self.body, self.hours, state, until=until, work=work, leaves=leaves, at_task=True)

    def report(self, stated: DeviceReport, time: float) -> DeviceReport:
        """What it tells of itself now, coarse as it is."""
        state, capacity = self.at(time), self.body.capacity
        return replace(
            stated,
            battery_wh=capacity,
            battery=None if capacity is None else math.floor(5 * state.charge / capacity + 1e-9) / 5,
            charging=capacity is not None and self.hours.plugged(time),
            busy=self.task is not None or not self.hours.idle(time),
            hot=state.heat.hot or state.heat.level >= WARM,
        )
