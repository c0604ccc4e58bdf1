"""Power of choice: select the devices with the highest loss (Cho et al., 2020, arXiv:2010.01243).

Candidates are drawn at random, here with equal probabilities since devices don't report their number of pictures, and
those with the highest loss are selected. The loss is the latest reported one (the paper's π_rpow-d): an evaluation by
all candidates would take an additional round. Devices without a reported loss come first.
"""

from __future__ import annotations

import math

from strategies.selection import DeviceCandidate, DeviceCandidates, Sampling, selection
from strategies.selection.candidate_sample import best_of_sample, check_candidate_factor


@selection("power_of_choice")
class PowerOfChoice:
    """Select `size` devices of `candidate_factor` · `size` drawn at random (d in the paper).

    Args:
        size: number of devices to select.
        candidate_factor: drawn devices per selected one.
        seed: seed of the run.
    """

    sensitivity = Sampling(data_independent=False, amplifies=False, reason="by reported losses only")

    def __init__(self, *, size: int, candidate_factor: float = 2.0, seed: int) -> None:
        check_candidate_factor(candidate_factor, size)
        self._size, self._candidate_factor, self._seed = size, candidate_factor, seed

    def select(self, devices: DeviceCandidates, *, draw: int) -> list[str]:
        return best_of_sample(
            devices, _merit, size=self._size, candidate_factor=self._candidate_factor, seed=self._seed, draw=draw
        )


def _merit(candidate: DeviceCandidate) -> float:
    return math.inf if candidate.loss is None else candidate.loss
