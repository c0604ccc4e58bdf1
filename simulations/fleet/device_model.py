"""How a device lives through time: what it draws and charges, how warm it is, and what becomes of its work.

Between two changes (a plug, an owner, heat, a flat battery, the end of the work) everything is linear in time: it is
followed from one to the next, exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from conf.schemas.planning import DeviceProfile
from conf.schemas.simulation import Profile
from simulations.fleet.availability import Hours
from simulations.fleet.battery import charge_after, flow, seconds_until
from simulations.fleet.heat import Heat, heat_after, seconds_until_change

WAKES = 0.05
"""Share of a full battery at which a device that was flat is switched on again."""
FLAT, LEFT = "flat", "left"
_LEAST = 1e-6  # seconds that a step takes at least: rounding must not stop time


@dataclass(frozen=True, kw_only=True)
class Body:
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
    def of(profile: Profile, device: DeviceProfile) -> Body:
        """Of a fleet's profile and its hardware."""
        return Body(
            watts_idle=device.watts_idle,
            watts_busy=device.watts_busy,
            capacity=device.battery_wh,
            charger=profile.charger_watts,
            hot_after=profile.hot_after,
            cool_after=profile.cool_after,
            hot_speed=profile.hot_speed,
        )


class Moment(NamedTuple):
    """How a device is at one time."""

    time: float
    charge: float = 0.0
    """Watt-hours."""
    heat: Heat = Heat()
    off: bool = False


class Lived(NamedTuple):
    """How a device is after some time, and what that took."""

    moment: Moment
    joules: float
    """That the whole device drew."""
    left: float
    """Seconds of work, at full speed, that are not done."""
    fate: str = ""
    """Why it broke off: FLAT or LEFT; empty if it didn't."""
    drained: float = 0.0
    """Joules that its battery gave."""


def live(
    body: Body,
    hours: Hours,
    moment: Moment,
    *,
    until: float = math.inf,
    work: float | None = None,
    leaves: bool = False,
    at_task: bool = False,
) -> Lived:
    """From one moment until a time, or until the work is done or broken off.

    A hot device works slower, and what it draws beyond idling falls with its speed.

    Args:
        work: seconds at full speed; None: it does nothing but be there.
        leaves: it breaks off as soon as it is unplugged or used and was not so at first.
        at_task: it breaks off when it is flat, also if it has nothing to compute, but to send.
    """
    joules, drained, left = 0.0, 0.0, work or 0.0
    alone, plugged_first = hours.idle(moment.time), hours.plugged(moment.time)
    at_task = at_task or work is not None
    while moment.time < until and (work is None or left > 0.0):
        time, plugged = moment.time, hours.plugged(moment.time)
        moment = moment._replace(off=_off(body, moment, plugged=plugged))
        if at_task and moment.off:
            return Lived(moment, joules, left, FLAT, drained)
        if leaves and ((alone and not hours.idle(time)) or (plugged_first and not plugged)):
            return Lived(moment, joules, left, LEFT, drained)
        speed = 0.0 if moment.off or work is None else body.hot_speed if moment.heat.hot else 1.0
        drawn = 0.0 if moment.off else body.watts_idle + speed * (body.watts_busy - body.watts_idle)
        watts = flow(drawn, plugged=plugged, charger=body.charger)
        seconds = min(
            until - time,
            hours.next_change(time) - time,
            _until_switched(body, moment, watts),
            seconds_until_change(
                moment.heat, working=speed > 0.0, hot_after=body.hot_after, cool_after=body.cool_after
            ),
            left / speed if speed else math.inf,
        )
        seconds = max(seconds, _LEAST)
        joules += drawn * seconds
        if body.capacity is not None:
            drained += max(0.0, -watts) * seconds
        left = 0.0 if (done := speed * seconds) >= left - _LEAST / 2 else left - done
        moment = Moment(
            time=time + seconds,
            charge=0.0
            if body.capacity is None
            else charge_after(moment.charge, watts, seconds, capacity=body.capacity),
            heat=heat_after(
                moment.heat, seconds, working=speed > 0.0, hot_after=body.hot_after, cool_after=body.cool_after
            ),
            off=moment.off,
        )
    moment = moment._replace(off=_off(body, moment, plugged=hours.plugged(moment.time)))
    return Lived(moment, joules, left, drained=drained)


def _off(body: Body, moment: Moment, *, plugged: bool) -> bool:
    if body.capacity is None:
        return not plugged
    return moment.charge < (WAKES * body.capacity - _LEAST if moment.off else _LEAST)


def _until_switched(body: Body, moment: Moment, watts: float) -> float:
    """Seconds until its battery is flat, or a flat one has enough to start."""
    if body.capacity is None:
        return math.inf
    return seconds_until(WAKES * body.capacity if moment.off else 0.0, moment.charge, watts)
