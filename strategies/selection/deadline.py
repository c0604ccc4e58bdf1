"""Ask those whose round fits the deadline, and of these the most useful per second.

After FedCS (Nishio & Yonetani, 2019, arXiv:1804.08333): candidates are drawn at random, and those that take least time
are admitted as long as the deadline holds them. Our rounds train in parallel and plans differ, so a device is held
against the deadline by itself, and ranked by what it trains in a second.
"""

from __future__ import annotations

from strategies.selection import DeviceCandidate, DeviceCandidates, Sampling
from strategies.selection.power_of_choice import best_of_sample, check_more


class Deadline:
    """`size` devices of `more` times as many drawn at random.

    Where too few of them fit, the least late fill up: fewer would be asked otherwise.

    Args:
        seconds: the deadline of a round.
    """

    sensitivity = Sampling(
        data_independent=True,
        amplifies=False,
        reason="by speed and link, which are of the kind of device, among a random sample",
    )

    def __init__(self, *, size: int, seconds: float, more: float, seed: int) -> None:
        check_more(more, size)
        if not seconds > 0:
            raise ValueError(f"{seconds=}: must be over 0")
        self._size, self._seconds, self._more, self._seed = size, seconds, more, seed

    def select(self, devices: DeviceCandidates, *, draw: int) -> list[str]:
        return best_of_sample(devices, self._merit, size=self._size, more=self._more, seed=self._seed, draw=draw)

    def _merit(self, one: DeviceCandidate) -> tuple[bool, float]:
        if one.seconds > self._seconds:
            return False, -one.seconds
        return True, one.plan.steps * one.plan.batch_size / one.seconds
