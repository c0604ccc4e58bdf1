"""How a device lives through time: what it draws and charges, how warm it is, and what becomes of its work.

Between two changes (a plug, an owner, heat, a flat battery, the end of the work) everything is linear in time: it is
followed from one to the next, exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from conf.schemas.planning import DeviceProfileConfig
from conf.schemas.simulation import ProfileConfig
from simulations.fleet.availability import Availability
from simulations.fleet.battery import charge_after, flow, seconds_until
from simulations.fleet.heat import Heat, heat_after, seconds_until_change

WAKE_CHARGE = 0.05
"""Share of a full battery at which a device that was flat is switched on again."""
FLAT, LEFT = "flat", "left"
_LEAST = 1e-6  # seconds that a step takes at least: rounding must not stop time


@dataclass(frozen=True, kw_only=True)
class PowerModel:
    """What one kind of device is made of."""

    watts_idle: float
    watts_busy: float
    capacity: float | None = None
    """Watt-hours; None without a battery: then it is on while it is plugged in."""
    charger: float = 0.0
    """Watts."""
    hot_after: float | None = None
    cool_after: float = 600.0
    hot_speed: float = 1.0

    @staticmethod
    def of(profile: ProfileConfig, device: DeviceProfileConfig) -> PowerModel:
        """Of a fleet's profile and its hardware."""
        return PowerModel(
            watts_idle=device.watts_idle,
            watts_busy=device.watts_busy,
            capacity=device.battery_wh,
            charger=profile.charger_watts,
            hot_after=profile.hot_after,
            cool_after=profile.cool_after,
            hot_speed=profile.hot_speed,
        )


class DeviceState(NamedTuple):
    """How a device is at one time."""

    time: float
    charge: float = 0.0
    """Watt-hours."""
    heat: Heat = Heat()
    off: bool = False


class AdvanceResult(NamedTuple):
    """How a device is after some time, and what that took."""

    state: DeviceState
    joules: float
    """That the whole device drew."""
    left: float
    """Seconds of work, at full speed, that are not done."""
    abort_reason: str = ""
    """Why it broke off: FLAT or LEFT; empty if it didn't."""
    drained: float = 0.0
    """Joules that its battery gave."""


def live(
    body: PowerModel,
    hours: Availability,
    state: DeviceState,
    *,
    until: float = math.inf,
    work: float | None = None,
    leaves: bool = False,
    at_task: bool = False,
) -> AdvanceResult:
    """From one moment until a time, or until the work is done or broken off.

    A hot device works slower, and what it draws beyond idling falls with its speed.

    Args:
        work: seconds at full speed; None: it does nothing but be there.
        leaves: it breaks off as soon as it is unplugged or used and was not so at first.
        at_task: it breaks off when it is flat, also if it has nothing to compute, but to send.
    """
    joules, drained, left = 0.0, 0.0, work or 0.0
    alone, plugged_first = hours.idle(state.time), hours.plugged(state.time)
    at_task = at_task or work is not None
    while state.time < until and (work is None or left > 0.0):
        time, plugged = state.time, hours.plugged(state.time)
        state = state._replace(off=_off(body, state, plugged=plugged))
        if at_task and state.off:
            return AdvanceResult(state, joules, left, FLAT, drained)
        if leaves and ((alone and not hours.idle(time)) or (plugged_first and not plugged)):
            return AdvanceResult(state, joules, left, LEFT, drained)
        speed = 0.0 if state.off or work is None else body.hot_speed if state.heat.hot else 1.0
        drawn = 0.0 if state.off else body.watts_idle + speed * (body.watts_busy - body.watts_idle)
        watts = flow(drawn, plugged=plugged, charger=body.charger)
        seconds = min(
            until - time,
            hours.next_change(time) - time,
            _until_switched(body, state, watts),
            seconds_until_change(state.heat, working=speed > 0.0, hot_after=body.hot_after, cool_after=body.cool_after),
            left / speed if speed else math.inf,
        )
        seconds = max(seconds, _LEAST)
        joules += drawn * seconds
        if body.capacity is not None:
            drained += max(0.0, -watts) * seconds
        left = 0.0 if (done := speed * seconds) >= left - _LEAST / 2 else left - done
        state = DeviceState(
            time=time + seconds,
            charge=0.0 if body.capacity is None else charge_after(state.charge, watts, seconds, capacity=body.capacity),
            heat=heat_after(
                state.heat, seconds, working=speed > 0.0, hot_after=body.hot_after, cool_after=body.cool_after
            ),
            off=state.off,
        )
    state = state._replace(off=_off(body, state, plugged=hours.plugged(state.time)))
    return AdvanceResult(state, joules, left, drained=drained)


def _off(body: PowerModel, state: DeviceState, *, plugged: bool) -> bool:
    if body.capacity is None:
        return not plugged
    return state.charge < (WAKE_CHARGE * body.capacity - _LEAST if state.off else _LEAST)


def _until_switched(body: PowerModel, state: DeviceState, watts: float) -> float:
    """Seconds until its battery is flat, or a flat one has enough to start."""
    if body.capacity is None:
        return math.inf
    return seconds_until(WAKE_CHARGE * body.capacity if state.off else 0.0, state.charge, watts)
