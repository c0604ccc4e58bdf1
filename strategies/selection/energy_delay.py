"""Ask those that train most for the time and the energy that it takes them.

Both are known before a device was ever asked, from its report and its plan, so that nothing has to be explored first.
The merit of a device is what it trains, squared, over the product of its seconds and its joules: an energy-delay
product, as for circuits (Gonzalez & Horowitz, 1996), whose square in the numerator makes merits of plans of different
length comparable.
"""

from __future__ import annotations

from strategies.selection import DeviceCandidate, DeviceCandidates, Sampling
from strategies.selection.power_of_choice import best_of_sample, check_more


class EnergyDelay:
    """`size` devices of `more` times as many drawn at random."""

    sensitivity = Sampling(
        data_independent=True,
        amplifies=False,
        reason="by speed, power and link, which are of the kind of device, among a random sample",
    )

    def __init__(self, *, size: int, more: float, seed: int) -> None:
        check_more(more, size)
        self._size, self._more, self._seed = size, more, seed

    def select(self, devices: DeviceCandidates, *, draw: int) -> list[str]:
        return best_of_sample(devices, merit, size=self._size, more=self._more, seed=self._seed, draw=draw)


def merit(one: DeviceCandidate) -> float:
    """Examples² per second and joule; of what takes nothing without bound."""
    took = one.seconds * one.joules
    return (one.plan.steps * one.plan.batch_size) ** 2 / took if took else float("inf")
