"""Poisson sampling: select each device independently with a fixed probability.

The only selection whose secrecy improves the privacy guarantee. The proof requires: the rate never changes; a coin is
flipped for every device, independently of the others; no device replaces one that is absent or refuses, which
contributes zero; the randomness comes from the operating system and is never revealed; and a repeated round is charged
again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from privacy.noise import NoiseSource
from strategies.selection import Sampling, selection


@selection("poisson")
class Poisson:
    """Select each device with probability `rate`, independently in each round; possibly none.

    Args:
        rate: probability.
        rng: makes the randomness of a round; `SecureNoise` on a real server.
    """

    sensitivity = Sampling(data_independent=True, amplifies=True, reason="a secret coin flip for each device")

    chosen_by = "cohort.sampling_rate"

    def __init__(self, *, rate: float, rng: Callable[[int], NoiseSource]) -> None:
        if not 0 < rate <= 1:
            raise ValueError(f"{rate=}: must lie between 0 and 1")
        self.rate, self._rng = rate, rng

    def select(self, devices: Collection[str], *, draw: int) -> list[str]:
        names = sorted(devices)
        return [names[index] for index in self._rng(draw).poisson_batch(len(names), self.rate).tolist()]
