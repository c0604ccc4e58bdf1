"""Ask the devices that promise most for the time they take (Lai et al., OSDI 2021, algorithm 1).

Where the paper leaves a setting open we follow its code in FedScale. A run with privacy knows no losses: then the
utility of a device is in its speed and in how long ago it was asked.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from common.seeding import derive_seed
from strategies.selection import DeviceCandidate, DeviceCandidates, Sampling, check_size
from strategies.selection.utility import quantile, staleness_bonus, statistical_utility, system_utility, unit_range


@dataclass(frozen=True, kw_only=True)
class OortSettings:
    """As in the paper, and FedScale's defaults."""

    alpha: float = 2.0
    """Penalty of slow devices."""
    exploration: float = 0.9
    """ε: share of the devices asked in the first round that were never asked before."""
    decay: float = 0.98
    """Of ε in each round."""
    least: float = 0.3
    """That ε falls to."""
    cutoff: float = 0.95
    """c: who has this share of the utility of the last one exploited may take its place."""
    clip: float = 0.9
    """Quantile that utilities are cut at: whoever tells a huge loss gains nothing by it."""
    preferred: float = 0.3
    """Quantile of all candidates' seconds that T starts at."""
    window: int = 20
    """W: rounds between two looks of the pacer."""
    step: float = 0.05
    """By how much the pacer moves that quantile."""
    most: int | None = None
    """Rounds after which a device is asked no more while there are others; None: no limit."""


def utility_alone(utility: float, one: DeviceCandidate) -> float:  # noqa: ARG001
    return utility


class Oort:
    """`size` devices: most by utility, some that were never asked.

    Args:
        reward: what a device is drawn by, of its utility.
    """

    sensitivity = Sampling(
        data_independent=True,
        amplifies=False,
        reason="by speed, and by when each was asked; under privacy no loss is told",
    )

    def __init__(
        self,
        *,
        size: int,
        seed: int,
        settings: OortSettings,
        reward: Callable[[float, DeviceCandidate], float] = utility_alone,
    ) -> None:
        check_size(size)
        self._size, self._seed, self._settings, self._reward = size, seed, settings, reward

    def select(self, devices: DeviceCandidates, *, draw: int) -> list[str]:
        chosen = self._settings
        coins = random.Random(derive_seed(self._seed, draw, "oort"))
        share = paced_quantile(devices.losses, chosen.preferred, window=chosen.window, step=chosen.step)
        preferred = quantile((one.seconds for one in devices.values()), share)
        new = {name: one for name, one in devices.items() if not one.asked}
        known = self._rested({name: one for name, one in devices.items() if one.asked}, new)
        utility = utilities(known, preferred=preferred, round=devices.round, settings=chosen)
        explore = int(self._size * max(chosen.exploration * chosen.decay ** (devices.round - 1), chosen.least))
        exploit = min(len(known), max(self._size - explore, self._size - len(new)))
        rewards = {name: self._reward(utility[name], one) for name, one in known.items()}
        asked = weighted_sample(above_cutoff(rewards, exploit, chosen.cutoff), exploit, coins)
        speeds = {
            name: self._reward(system_utility(one.seconds, preferred, chosen.alpha), one) for name, one in new.items()
        }
        return sorted(asked + weighted_sample(speeds, self._size - len(asked), coins))

    def _rested(
        self, known: dict[str, DeviceCandidate], new: Mapping[str, DeviceCandidate]
    ) -> dict[str, DeviceCandidate]:
        """Without those that have done their part, as long as there are others to ask."""
        most = self._settings.most
        rested = {name: one for name, one in known.items() if most is None or one.asked < most}
        return rested if len(rested) + len(new) >= self._size else known


def utilities(
    known: Mapping[str, DeviceCandidate], *, preferred: float, round: int, settings: OortSettings
) -> dict[str, float]:
    """Of devices that were asked before, the utility of each: about 0 to 1.

    Args:
        preferred: T, the seconds that a round is to take.
    """
    told = {name: value for name, one in known.items() if (value := statistical_utility(one)) is not None}
    scaled = dict(zip(told, unit_range(list(told.values()), settings.clip), strict=True))
    return {
        name: (scaled.get(name, 0.0) + staleness_bonus(round, one.last))
        * system_utility(one.seconds, preferred, settings.alpha)
        for name, one in known.items()
    }


def paced_quantile(losses: Sequence[float], start: float, *, window: int, step: float) -> float:
    """The quantile of durations that T is now: the pacer of algorithm 1, as FedScale runs it.

    Every `window` rounds it compares the utility of the last window with the one before. Flat to a tenth: what fast
    devices have is learned, and slower ones are let in. Five times another: fewer are.
    """
    share = start
    for end in range(2 * window, len(losses) + 1, window):
        before, now = sum(losses[end - 2 * window : end - window]), sum(losses[end - window : end])
        if abs(now - before) <= 0.1 * before:
            share = min(1.0, share + step)
        elif abs(now - before) >= 5 * before:
            share = max(step, share - step)
    return share


def above_cutoff(scores: Mapping[str, float], size: int, cutoff: float) -> dict[str, float]:
    """Those with at least `cutoff` of the utility that the `size`-th best has."""
    if size < 1:
        return {}
    least = cutoff * sorted(scores.values(), reverse=True)[size - 1]
    return {name: score for name, score in scores.items() if score >= least}


def weighted_sample(weights: Mapping[str, float], size: int, coins: random.Random) -> list[str]:
    """`size` names without replacement, each draw in proportion to its weight (Efraimidis & Spirakis, 2006)."""
    tickets = {name: math.log(1 - coins.random()) / max(weights[name], 1e-9) for name in sorted(weights)}
    return sorted(tickets, key=lambda name: (tickets[name], name), reverse=True)[:size]
