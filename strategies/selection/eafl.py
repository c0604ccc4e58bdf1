"""EAFL: select the devices with the most remaining battery after a round (Arouj & Abdelmoniem, 2022, arXiv:2208.04505).

Oort, where the reward of a device is f · utility + (1 − f) · power. Power is the battery charge that would remain after
the round, and 1 for a device that is charging or has no battery.
"""

from __future__ import annotations

from functools import partial

from common.units import HOUR
from strategies.selection import DeviceCandidate, DeviceCandidates, Sampling, selection
from strategies.selection.oort import Oort, OortSettings


@selection("eafl")
class EAFL:
    """Select `size` devices.

    Args:
        size: number of devices.
        seed: seed of the run.
        utility_weight: f, the weight of utility; 0.25 in the paper's code.
        settings: settings of Oort.
    """

    sensitivity = Sampling(
        data_independent=True,
        amplifies=False,
        reason="by battery charge, speed, and when each was asked; under privacy no loss is reported",
        uses_transient_state=True,
    )

    def __init__(self, *, size: int, seed: int, utility_weight: float = 0.25, settings: OortSettings) -> None:
        if not 0 <= utility_weight <= 1:
            raise ValueError(f"{utility_weight=}: must be 0 to 1")
        self._oort = Oort(size=size, seed=seed, settings=settings, reward=partial(reward, weight=utility_weight))

    def select(self, devices: DeviceCandidates, *, draw: int) -> list[str]:
        return self._oort.select(devices, draw=draw)


def reward(utility: float, candidate: DeviceCandidate, *, weight: float) -> float:
    """Compute f · utility + (1 − f) · power.

    Args:
        utility: Oort's utility of the device, about 0 to 1.
        candidate: the device; power is its `remaining_charge`.
        weight: f, 0 to 1.
    """
    return weight * utility + (1 - weight) * remaining_charge(candidate)


def remaining_charge(candidate: DeviceCandidate) -> float:
    """Predict the battery charge after the round, 0 to 1; the current charge if its capacity is unknown."""
    report = candidate.report
    if report.battery is None or report.charging:
        return 1.0
    used = candidate.joules / (HOUR * report.battery_wh) if report.battery_wh else 0.0
    return max(0.0, report.battery - used)
