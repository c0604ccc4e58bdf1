"""Energy, heat and progress of one device over time.

Between two changes (plugged in or out, owner, throttling, empty battery, end of the work) everything is linear in time,
so the state is advanced exactly from one change to the next.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from conf.schemas.fleet import ProfileConfig
from conf.schemas.planning import DeviceProfileConfig
from simulations.fleet.availability import Availability
from simulations.fleet.battery import charge_after, flow, seconds_until
from simulations.fleet.heat import Heat, heat_after, seconds_until_change

WAKE_CHARGE = 0.05
"""Fraction of a full battery at which a device with an empty battery switches on again."""
FLAT, LEFT = "flat", "left"  # stored; don't change
"""Causes of aborted work: the battery is empty; the owner used or unplugged the device."""
_MIN_STEP = 1e-6  # seconds: rounding must not stop time


@dataclass(frozen=True, kw_only=True)
class PowerModel:
    """Power and heat parameters of one kind of device; times are in seconds."""

    watts_idle: float
    watts_busy: float
    capacity: float | None = None
    """Charge of a full battery in watt-hours; None: no battery, so the device is on only while it is plugged in."""
    charger: float = 0.0
    """Power of the charger in watts."""
    throttle_after: float | None = None
    cooldown: float = 600.0
    throttled_speed: float = 1.0

    @staticmethod
    def of(profile: ProfileConfig, device: DeviceProfileConfig) -> PowerModel:
        """Build the model of a fleet profile on its hardware."""
        return PowerModel(
            watts_idle=device.watts_idle,
            watts_busy=device.watts_busy,
            capacity=device.battery_wh,
            charger=profile.charger_watts,
            throttle_after=profile.throttle_after,
            cooldown=profile.cooldown,
            throttled_speed=profile.throttled_speed,
        )


class DeviceState(NamedTuple):
    """State of a device at one time."""

    time: float
    """Time on the fleet's clock, in seconds."""
    charge: float = 0.0
    """Battery charge in watt-hours."""
    heat: Heat = Heat()
    off: bool = False


class AdvanceResult(NamedTuple):
    """State after some time, and the energy and work of that time."""

    state: DeviceState
    joules: float
    """Energy that the device drew."""
    remaining_work: float
    """Remaining seconds of work at full speed."""
    abort_reason: str = ""
    """FLAT or LEFT; empty if the work was not aborted."""
    drained: float = 0.0
    """Energy drawn from the battery, in joules."""


def advance(
    power_model: PowerModel,
    availability: Availability,
    state: DeviceState,
    *,
    until: float = math.inf,
    work: float | None = None,
    interruptible: bool = False,
    on_task: bool = False,
) -> AdvanceResult:
    """Advance a device until a time, or until its work is completed or aborted.

    A throttled device works slower, and its power above idle falls in proportion.

    Args:
        power_model: power and heat parameters.
        availability: times at which the device is plugged in and unused.
        state: state at the start.
        until: end on the fleet's clock, in seconds.
        work: seconds of work at full speed; None: the device is idle.
        interruptible: abort if the device is unplugged or used, unless it was so at the start.
        on_task: abort on an empty battery even without work, e.g. during a transfer.
    """
    joules, drained, remaining_work = 0.0, 0.0, work or 0.0
    idle_first, plugged_first = availability.idle(state.time), availability.plugged(state.time)
    on_task = on_task or work is not None
    while state.time < until and (work is None or remaining_work > 0.0):
        time, plugged = state.time, availability.plugged(state.time)
        state = state._replace(off=_is_off(power_model, state, plugged=plugged))
        if on_task and state.off:
            return AdvanceResult(state, joules, remaining_work, FLAT, drained)
        if interruptible and ((idle_first and not availability.idle(time)) or (plugged_first and not plugged)):
            return AdvanceResult(state, joules, remaining_work, LEFT, drained)
        speed = 0.0 if state.off or work is None else power_model.throttled_speed if state.heat.hot else 1.0
        drawn = 0.0 if state.off else power_model.watts_idle + speed * (power_model.watts_busy - power_model.watts_idle)
        watts = flow(drawn, plugged=plugged, charger=power_model.charger)
        seconds = min(
            until - time,
            availability.next_change(time) - time,
            _until_switched(power_model, state, watts),
            seconds_until_change(
                state.heat,
                working=speed > 0.0,
                throttle_after=power_model.throttle_after,
                cooldown=power_model.cooldown,
            ),
            remaining_work / speed if speed else math.inf,
        )
        seconds = max(seconds, _MIN_STEP)
        joules += drawn * seconds
        if power_model.capacity is not None:
            drained += max(0.0, -watts) * seconds
        worked = speed * seconds
        remaining_work = 0.0 if worked >= remaining_work - _MIN_STEP / 2 else remaining_work - worked
        state = DeviceState(
            time=time + seconds,
            charge=0.0
            if power_model.capacity is None
            else charge_after(state.charge, watts, seconds, capacity=power_model.capacity),
            heat=heat_after(
                state.heat,
                seconds,
                working=speed > 0.0,
                throttle_after=power_model.throttle_after,
                cooldown=power_model.cooldown,
            ),
            off=state.off,
        )
    state = state._replace(off=_is_off(power_model, state, plugged=availability.plugged(state.time)))
    return AdvanceResult(state, joules, remaining_work, drained=drained)


def _is_off(power_model: PowerModel, state: DeviceState, *, plugged: bool) -> bool:
    if power_model.capacity is None:
        return not plugged
    return state.charge < (WAKE_CHARGE * power_model.capacity - _MIN_STEP if state.off else _MIN_STEP)


def _until_switched(power_model: PowerModel, state: DeviceState, watts: float) -> float:
    """Return the seconds until the battery is empty, or until an empty one has enough charge to switch on."""
    if power_model.capacity is None:
        return math.inf
    return seconds_until(WAKE_CHARGE * power_model.capacity if state.off else 0.0, state.charge, watts)
