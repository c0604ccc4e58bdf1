"""Select the devices with the most training per unit of time and energy.

Both are predicted from report and plan before a device is ever asked, so no exploration is needed. The merit of a
device is the square of its training examples over the product of its seconds and joules: an energy-delay product, as
for circuits (Gonzalez & Horowitz, 1996). The square in the numerator makes plans of different lengths comparable.
"""

from __future__ import annotations

from strategies.selection import DeviceCandidate, DeviceCandidates, Sampling, selection
from strategies.selection.candidate_sample import best_of_sample, check_candidate_factor


@selection("energy_delay")
class EnergyDelay:
    """Select `size` devices of `candidate_factor` · `size` drawn at random.

    Args:
        size: number of devices.
        candidate_factor: drawn devices per selected one.
        seed: seed of the run.
    """

    sensitivity = Sampling(
        data_independent=True,
        amplifies=False,
        reason="by speed, power and link, which belong to the device type, within a random sample",
    )

    def __init__(self, *, size: int, candidate_factor: float = 2.0, seed: int) -> None:
        check_candidate_factor(candidate_factor, size)
        self._size, self._candidate_factor, self._seed = size, candidate_factor, seed

    def select(self, devices: DeviceCandidates, *, draw: int) -> list[str]:
        return best_of_sample(
            devices, merit, size=self._size, candidate_factor=self._candidate_factor, seed=self._seed, draw=draw
        )


def merit(candidate: DeviceCandidate) -> float:
    """Compute examples² per second and joule; infinite for a plan without cost."""
    cost = candidate.seconds * candidate.joules
    return (candidate.plan.steps * candidate.plan.batch_size) ** 2 / cost if cost else float("inf")
