"""Ask a random sample of fixed size.

Not an amplification of privacy: the sample is reproducible from the seed, and is accounted as if everyone were asked.
"""

from __future__ import annotations

import random
from collections.abc import Collection

from common.seeding import derive_seed
from strategies.selection import Sampling


class Sample:
    """`size` devices without replacement, or all if there are fewer; the same for one seed, draw and set of names.

    Args:
        purpose: names the random stream: who is asked for one thing says nothing of who is asked for another.
    """

    sensitivity = Sampling(
        data_independent=True,
        amplifies=False,
        reason="of fixed size, from a seed that is no secret, over whoever is there",
    )

    def __init__(self, *, size: int, seed: int, purpose: str = "selection") -> None:
        if size < 1:
            raise ValueError(f"{size=}: must be 1 or more")
        self._size, self._seed, self._purpose = size, seed, purpose

    def select(self, devices: Collection[str], *, draw: int) -> list[str]:
        names = sorted(devices)
        coins = random.Random(derive_seed(self._seed, draw, self._purpose))
        return sorted(coins.sample(names, min(self._size, len(names))))
