"""State and current task of one device of a simulated fleet."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from protocol.messages import DeviceReport
from simulations.fleet.availability import Availability
from simulations.fleet.device_model import AdvanceResult, DeviceState, PowerModel, advance
from simulations.fleet.hardware import Hardware

REPORTED_HOT_LEVEL = 0.8
"""Heat level from which a device reports that it is hot."""


class TaskPhase(NamedTuple):
    """One part of a task: computing, or sending and receiving."""

    start: DeviceState
    work: float | None
    """Seconds at full speed; None: nothing is computed."""


@dataclass(kw_only=True)
class Task:
    """Progress of a device's answer to one message."""

    message_id: str
    started: float
    """Time on the fleet's clock, in seconds."""
    joules: float = 0.0
    drained: float = 0.0
    """Energy drawn from the battery, in joules."""
    phases: list[TaskPhase] = field(default_factory=list)


@dataclass(kw_only=True)
class VirtualDevice:
    """One simulated device and its owner's habits."""

    name: str
    hardware: Hardware
    power_model: PowerModel
    availability: Availability
    state: DeviceState
    """Last state at which the device was idle."""
    task: Task | None = None
    waiting: deque[str] = field(default_factory=deque)
    """Ids of the messages that the device will answer after the current task."""

    def state_at(self, time: float) -> DeviceState:
        """Return the state at a time, idle or during a task; the times of successive calls must not decrease."""
        if self.task is None or not self.task.phases:
            self.state = advance(self.power_model, self.availability, self.state, until=time).state
            return self.state
        phases = self.task.phases
        phase = next((phase for phase in reversed(phases) if phase.start.time <= time), phases[0])
        return self._advance(phase.start, until=time, work=phase.work).state

    def run_phase(self, *, until: float = math.inf, work: float | None = None) -> AdvanceResult:
        """Run the next phase of the task: computing `work` seconds, or transferring data until a time."""
        assert self.task is not None
        self.task.phases.append(TaskPhase(self.state, work))
        result = self._advance(self.state, until=until, work=work)
        self.state = result.state
        self.task.joules += result.joules
        self.task.drained += result.drained
        return result

    def _advance(self, state: DeviceState, *, until: float, work: float | None) -> AdvanceResult:
        interruptible = self.hardware.profile.interruptible
        return advance(
            self.power_model,
            self.availability,
            state,
            until=until,
            work=work,
            interruptible=interruptible,
            on_task=True,
        )

    def report(self, stated: DeviceReport, time: float) -> DeviceReport:
        """Return `stated` with the device's current state, in coarse steps."""
        state, capacity = self.state_at(time), self.power_model.capacity
        return replace(
            stated,
            battery_wh=capacity,
            battery=None if capacity is None else math.floor(5 * state.charge / capacity + 1e-9) / 5,
            charging=capacity is not None and self.availability.plugged(time),
            busy=self.task is not None or not self.availability.idle(time),
            hot=state.heat.hot or state.heat.level >= REPORTED_HOT_LEVEL,
        )
