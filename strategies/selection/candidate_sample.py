"""Draw more candidates than needed at random, and select the best of them.

The best of all devices are therefore not selected every time: `candidate_factor` = 1 is a random sample, and larger
values increase the preference.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from common.seeding import derive_seed
from strategies.selection import DeviceCandidate, DeviceCandidates, check_size


def best_of_sample(
    devices: DeviceCandidates,
    merit: Callable[[DeviceCandidate], Any],
    *,
    size: int,
    candidate_factor: float,
    seed: int,
    draw: int,
) -> list[str]:
    """Select the best among ⌈candidate_factor · size⌉ devices that are drawn without replacement.

    Args:
        devices: candidates by name.
        merit: value by which devices are ranked, largest first; names break ties.
        size: number of devices to select.
        candidate_factor: drawn devices per selected one.
        seed: seed of the run.
        draw: number of the random stream.

    Returns:
        Names, sorted.
    """
    names = sorted(devices)
    rng = random.Random(derive_seed(seed, draw, "choice"))
    drawn = rng.sample(names, min(len(names), -int(-candidate_factor * size // 1)))
    ranked = sorted(sorted(drawn), key=lambda name: merit(devices[name]), reverse=True)
    return sorted(ranked[:size])


def check_candidate_factor(candidate_factor: float, size: int) -> None:
    """Raise ValueError if fewer devices would be drawn than selected."""
    check_size(size)
    if not 1 <= candidate_factor < float("inf"):
        raise ValueError(f"{candidate_factor=}: must be 1 or more")
