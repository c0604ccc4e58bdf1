"""Ask the devices that a round leaves most power: EAFL (Arouj & Abdelmoniem, 2022, arXiv:2208.04505).

Oort, where the reward of a device is f · utility + (1 − f) · power, and power is what would be left of its battery
after the round. A device that charges, or has none, has all of it.
"""

from __future__ import annotations

from functools import partial

from common.units import HOUR
from strategies.selection import DeviceCandidate, DeviceCandidates, Sampling
from strategies.selection.oort import Oort, OortSettings


class Energy:
    """`size` devices.

    Args:
        weight: f, of utility beside power; the paper's code has 0.25.
    """

    sensitivity = Sampling(
        data_independent=True,
        amplifies=False,
        reason="by what is left of batteries, speed, and when each was asked; under privacy no loss is told",
        uses_transient_state=True,
    )

    def __init__(self, *, size: int, seed: int, weight: float, settings: OortSettings) -> None:
        if not 0 <= weight <= 1:
            raise ValueError(f"{weight=}: must be 0 to 1")
        self._oort = Oort(size=size, seed=seed, settings=settings, reward=partial(rewarded, weight=weight))

    def select(self, devices: DeviceCandidates, *, draw: int) -> list[str]:
        return self._oort.select(devices, draw=draw)


def rewarded(utility: float, one: DeviceCandidate, *, weight: float) -> float:
    """f · utility + (1 − f) · power."""
    return weight * utility + (1 - weight) * power(one)


def power(one: DeviceCandidate) -> float:
    """What the round leaves of a full battery, 0 to 1; of one whose size nobody told, what is there now."""
    report = one.report
    if report.battery is None or report.charging:
        return 1.0
    used = one.joules / (HOUR * report.battery_wh) if report.battery_wh else 0.0
    return max(0.0, report.battery - used)
