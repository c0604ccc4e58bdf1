"""Ask each device with a fixed probability, by itself: the only selection whose secrecy improves a promise.

What the proof needs, and where it would break: the rate never changes; a coin is tossed for every device alike,
whatever the others' showed; nobody is asked in place of one that is away or refuses, which contributes zero; the coins
come from the operating system and are shown to nobody; and a round that is run again is charged again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from privacy.noise import NoiseSource
from strategies.selection import Sampling


class Poisson:
    """Each device with the probability `rate`, anew each round; possibly none.

    Args:
        coins: the source for a round, `SecureNoise` on a real server.
    """

    sensitivity = Sampling(data_independent=True, amplifies=True, reason="a secret coin for each device")

    def __init__(self, *, rate: float, coins: Callable[[int], NoiseSource]) -> None:
        if not 0 < rate <= 1:
            raise ValueError(f"{rate=}: must lie between 0 and 1")
        self.rate, self._coins = rate, coins

    def select(self, devices: Collection[str], *, draw: int) -> list[str]:
        names = sorted(devices)
        return [names[place] for place in self._coins(draw).poisson_batch(len(names), self.rate).tolist()]
