"""Draw more candidates than are wanted, at random, and ask the best of them.

So the best of all are not asked every time: `more` = 1 is a random sample, and the more are drawn the further a
selection leans towards them.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from common.seeding import derive_seed
from strategies.selection import DeviceCandidate, DeviceCandidates, check_size


def best_of_sample(
    devices: DeviceCandidates,
    merit: Callable[[DeviceCandidate], object],
    *,
    size: int,
    more: float,
    seed: int,
    draw: int,
) -> list[str]:
    """The `size` of best merit among ⌈more · size⌉ devices drawn without replacement; names break ties."""
    names = sorted(devices)
    drawn = random.Random(derive_seed(seed, draw, "choice")).sample(names, min(len(names), -int(-more * size // 1)))
    return sorted(sorted(sorted(drawn), key=lambda name: merit(devices[name]), reverse=True)[:size])  # type: ignore[arg-type,return-value]


def check_more(more: float, size: int) -> None:
    """ValueError for a draw of fewer than are wanted."""
    check_size(size)
    if not 1 <= more < float("inf"):
        raise ValueError(f"{more=}: must be 1 or more")
