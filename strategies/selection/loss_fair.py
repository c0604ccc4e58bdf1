"""Ask those whom the adapter serves worst: power of choice (Cho et al., 2020, arXiv:2010.01243).

Candidates are drawn at random, here with equal probabilities since nobody tells how many pictures it has, and those of
the highest loss are asked. The loss is the one that a device told when it was asked last (the paper's π_rpow-d): to
have all candidates measure would cost a round of its own. One that has told none goes first.
"""

from __future__ import annotations

import math

from strategies.selection import DeviceCandidate, DeviceCandidates, Sampling
from strategies.selection.power_of_choice import best_of_sample, check_more


class PowerOfChoice:
    """`size` devices of `more` times as many drawn at random, d in the paper."""

    sensitivity = Sampling(
        data_independent=False, amplifies=False, reason="by the losses that devices told, and by nothing else"
    )

    def __init__(self, *, size: int, more: float, seed: int) -> None:
        check_more(more, size)
        self._size, self._more, self._seed = size, more, seed

    def select(self, devices: DeviceCandidates, *, draw: int) -> list[str]:
        return best_of_sample(devices, _merit, size=self._size, more=self._more, seed=self._seed, draw=draw)


def _merit(one: DeviceCandidate) -> float:
    return math.inf if one.loss is None else one.loss
