"""Select devices whose round meets the deadline, and among these the most useful per second.

After FedCS (Nishio & Yonetani, 2019, arXiv:1804.08333), where candidates are drawn at random and the fastest are
admitted until the deadline is reached. Here devices train in parallel and plans differ, so each device is compared with
the deadline separately, and ranked by the examples that it trains per second.
"""

from __future__ import annotations

from common.errors import AntherError
from strategies.selection import DeviceCandidate, DeviceCandidates, Sampling, selection
from strategies.selection.candidate_sample import best_of_sample, check_candidate_factor


@selection("deadline")
class Deadline:
    """Select `size` devices of `candidate_factor` · `size` drawn at random.

    If too few of them meet the deadline, the least late ones complete the selection.

    Args:
        size: number of devices.
        deadline: deadline of a round in seconds (`planning.deadline`).
        candidate_factor: drawn devices per selected one.
        seed: seed of the run.
    """

    sensitivity = Sampling(
        data_independent=True,
        amplifies=False,
        reason="by speed and link, which belong to the device type, within a random sample",
    )

    def __init__(self, *, size: int, deadline: float | None, candidate_factor: float = 2.0, seed: int) -> None:
        check_candidate_factor(candidate_factor, size)
        if deadline is None:
            raise AntherError("selection=deadline requires planning.deadline")
        if not deadline > 0:
            raise ValueError(f"{deadline=}: must be over 0")
        self._size, self._deadline, self._candidate_factor, self._seed = size, deadline, candidate_factor, seed

    def select(self, devices: DeviceCandidates, *, draw: int) -> list[str]:
        return best_of_sample(
            devices, self._merit, size=self._size, candidate_factor=self._candidate_factor, seed=self._seed, draw=draw
        )

    def _merit(self, candidate: DeviceCandidate) -> tuple[bool, float]:
        if candidate.seconds > self._deadline:
            return False, -candidate.seconds
        return True, candidate.plan.steps * candidate.plan.batch_size / candidate.seconds
