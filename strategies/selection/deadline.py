"""Select devices whose round meets the deadline, and among these the most useful per second.

After FedCS (Nishio & Yonetani, 2019, arXiv:1804.08333), where candidates are drawn at random and the fastest are
admitted until the deadline is reached. Here devices train in parallel and plans differ, so each device is compared with
the deadline separately, and ranked by the examples that it trains per second.
"""

from __future__ import annotations

from strategies.declarations import read_from
from strategies.selection import DeviceCandidate, DeviceCandidates, Sampling, selection
from strategies.selection.candidate_sample import best_of_sample, check_candidate_factor


@selection("deadline")
class Deadline:
    """Select `size` devices of `candidate_factor` · `size` drawn at random.

    If too few of them meet the deadline, the least late ones complete the selection.

    Args:
        size: number of devices.
        seconds: deadline of a round.
        candidate_factor: drawn devices per selected one.
        seed: seed of the run.
    """

    sensitivity = Sampling(
        data_independent=True,
        amplifies=False,
        reason="by speed and link, which belong to the device type, within a random sample",
    )

    options = read_from(seconds="planning.deadline", candidate_factor="selection.candidate_factor")

    def __init__(self, *, size: int, seconds: float, candidate_factor: float = 2.0, seed: int) -> None:
        check_candidate_factor(candidate_factor, size)
        if not seconds > 0:
            raise ValueError(f"{seconds=}: must be over 0")
        self._size, self._seconds, self._candidate_factor, self._seed = size, seconds, candidate_factor, seed

    def select(self, devices: DeviceCandidates, *, draw: int) -> list[str]:
        return best_of_sample(
            devices, self._merit, size=self._size, candidate_factor=self._candidate_factor, seed=self._seed, draw=draw
        )

    def _merit(self, candidate: DeviceCandidate) -> tuple[bool, float]:
        if candidate.seconds > self._seconds:
            return False, -candidate.seconds
        return True, candidate.plan.steps * candidate.plan.batch_size / candidate.seconds
