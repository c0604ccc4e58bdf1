"""Select a random sample of fixed size.

It does not amplify privacy: the sample is reproducible from the seed, and is accounted for as if every device were
asked.
"""

from __future__ import annotations

import random
from collections.abc import Collection

from common.seeding import derive_seed
from strategies.selection import Sampling, selection


@selection("random", purpose="selection")
class Sample:
    """Select `size` devices without replacement, or all if there are fewer; a function of seed, draw and names.

    Args:
        size: number of devices.
        seed: seed of the run.
        purpose: name of the random stream, so that samples for different purposes are independent.
    """

    sensitivity = Sampling(
        data_independent=True, amplifies=False, reason="fixed size, from a public seed, among connected devices"
    )

    def __init__(self, *, size: int, seed: int, purpose: str = "selection") -> None:
        if size < 1:
            raise ValueError(f"{size=}: must be 1 or more")
        self._size, self._seed, self._purpose = size, seed, purpose

    def select(self, devices: Collection[str], *, draw: int) -> list[str]:
        names = sorted(devices)
        rng = random.Random(derive_seed(self._seed, draw, self._purpose))
        return sorted(rng.sample(names, min(self._size, len(names))))
