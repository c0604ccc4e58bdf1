"""Oort: select the devices with the highest utility for their time (Lai et al., OSDI 2021, algorithm 1).

Settings that the paper leaves open follow its code in FedScale. A private run has no losses: then the utility of a
device depends on its speed and on when it was last asked.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from common.seeding import derive_seed
from strategies.selection import DeviceCandidate, DeviceCandidates, Sampling, check_size, selection
from strategies.selection.utility import quantile, staleness_bonus, statistical_utility, system_utility, unit_range

_FRACTIONS = (
    "exploration",
    "exploration_decay",
    "min_exploration",
    "cutoff",
    "clip_quantile",
    "duration_quantile",
    "pacer_step",
)


@dataclass(frozen=True, kw_only=True)
class OortSettings:
    """Settings of the paper, with FedScale's defaults."""

    alpha: float = 2.0
    """α, the penalty exponent of slow devices."""
    exploration: float = 0.9
    """ε, the fraction of new devices in the first round."""
    exploration_decay: float = 0.98
    """Factor of ε in each round."""
    min_exploration: float = 0.3
    """Minimum of ε."""
    cutoff: float = 0.95
    """c: devices with this fraction of the utility of the last exploited device may take its place."""
    clip_quantile: float = 0.9
    """Quantile at which utilities are clipped, so that reporting a huge loss gains nothing."""
    duration_quantile: float = 0.3
    """Initial quantile of all candidates' seconds that determines T."""
    pacer_window: int = 20
    """W, the rounds between two updates of the pacer."""
    pacer_step: float = 0.05
    """Change of that quantile in an update."""
    max_selections: int | None = None
    """Rounds after which a device is asked only if too few others are available; None: no limit."""

    def __post_init__(self) -> None:
        if not self.alpha >= 0:
            raise ValueError(f"alpha={self.alpha}: must be 0 or more")
        for name in _FRACTIONS:
            if not 0 < (value := getattr(self, name)) <= 1:
                raise ValueError(f"{name}={value}: must be over 0 and at most 1")
        if self.pacer_window < 1:
            raise ValueError(f"pacer_window={self.pacer_window}: must be 1 or more")
        if self.max_selections is not None and self.max_selections < 1:
            raise ValueError(f"max_selections={self.max_selections}: must be 1 or more, or null")


def utility_only(utility: float, candidate: DeviceCandidate) -> float:  # noqa: ARG001
    """Use the utility itself as the reward."""
    return utility


@selection("oort")
class Oort:
    """Select `size` devices: known ones by utility (exploitation), and some that were never asked (exploration).

    Args:
        size: number of devices.
        seed: seed of the run.
        settings: settings of the paper.
        reward: converts the utility of a device into the weight that it is drawn with.
    """

    sensitivity = Sampling(
        data_independent=True,
        amplifies=False,
        reason="by speed, and by when each was asked; under privacy no loss is reported",
    )

    def __init__(
        self,
        *,
        size: int,
        seed: int,
        settings: OortSettings,
        reward: Callable[[float, DeviceCandidate], float] = utility_only,
    ) -> None:
        check_size(size)
        self._size, self._seed, self._settings, self._reward = size, seed, settings, reward

    def select(self, devices: DeviceCandidates, *, draw: int) -> list[str]:
        settings = self._settings
        rng = random.Random(derive_seed(self._seed, draw, "oort"))
        fraction = paced_quantile(
            devices.losses, settings.duration_quantile, window=settings.pacer_window, step=settings.pacer_step
        )
        preferred = quantile((one.seconds for one in devices.values()), fraction)
        new = {name: one for name, one in devices.items() if not one.asked}
        known = self._below_limit({name: one for name, one in devices.items() if one.asked}, new)
        utility = utilities(known, preferred=preferred, round=devices.round, settings=settings)
        explore = int(
            self._size
            * max(settings.exploration * settings.exploration_decay ** (devices.round - 1), settings.min_exploration)
        )
        exploit = min(len(known), max(self._size - explore, self._size - len(new)))
        rewards = {name: self._reward(utility[name], one) for name, one in known.items()}
        exploited = weighted_sample(above_cutoff(rewards, exploit, settings.cutoff), exploit, rng)
        speeds = {
            name: self._reward(system_utility(one.seconds, preferred, settings.alpha), one) for name, one in new.items()
        }
        return sorted(exploited + weighted_sample(speeds, self._size - len(exploited), rng))

    def _below_limit(
        self, known: dict[str, DeviceCandidate], new: Mapping[str, DeviceCandidate]
    ) -> dict[str, DeviceCandidate]:
        """Drop devices that were asked in `max_selections` rounds, as long as there are enough others."""
        limit = self._settings.max_selections
        below = {name: one for name, one in known.items() if limit is None or one.asked < limit}
        return below if len(below) + len(new) >= self._size else known


def utilities(
    known: Mapping[str, DeviceCandidate], *, preferred: float, round: int, settings: OortSettings
) -> dict[str, float]:
    """Compute the utility of each device that was asked before, about 0 to 1.

    Args:
        known: devices that were asked before, by name.
        preferred: T, the preferred seconds of a round.
        round: number of the round.
        settings: settings of the paper.
    """
    reported = {name: value for name, one in known.items() if (value := statistical_utility(one)) is not None}
    scaled = dict(zip(reported, unit_range(list(reported.values()), settings.clip_quantile), strict=True))
    return {
        name: (scaled.get(name, 0.0) + staleness_bonus(round, one.last))
        * system_utility(one.seconds, preferred, settings.alpha)
        for name, one in known.items()
    }


def paced_quantile(losses: Sequence[float], start: float, *, window: int, step: float) -> float:
    """Compute the quantile of durations for T: the pacer of algorithm 1, as in FedScale.

    Every `window` rounds it compares the utility of the last window with the one before. If they are equal within a
    tenth, fast devices have little left to contribute, and slower ones are admitted. If the difference is five times
    the earlier utility or more, fewer slow devices are admitted.

    Args:
        losses: mean loss of each earlier round.
        start: initial quantile.
        window: rounds between two updates.
        step: change in an update.
    """
    fraction = start
    for end in range(2 * window, len(losses) + 1, window):
        before, now = sum(losses[end - 2 * window : end - window]), sum(losses[end - window : end])
        if abs(now - before) <= 0.1 * before:
            fraction = min(1.0, fraction + step)
        elif abs(now - before) >= 5 * before:
            fraction = max(step, fraction - step)
    return fraction


def above_cutoff(scores: Mapping[str, float], size: int, cutoff: float) -> dict[str, float]:
    """Keep the devices with at least the fraction `cutoff` of the `size`-th best score.

    Args:
        scores: scores by device name.
        size: number of devices to draw from the result; below 1 the result is empty.
        cutoff: fraction, 0 to 1.

    Returns:
        Scores of the kept devices, by name.
    """
    if size < 1:
        return {}
    threshold = cutoff * sorted(scores.values(), reverse=True)[size - 1]
    return {name: score for name, score in scores.items() if score >= threshold}


def weighted_sample(weights: Mapping[str, float], size: int, rng: random.Random) -> list[str]:
    """Draw names without replacement, in proportion to weight (Efraimidis & Spirakis, 2006).

    Args:
        weights: weights by name; those below 10⁻⁹ count as 10⁻⁹.
        size: number of names; all names if there are fewer.
        rng: source of randomness.

    Returns:
        Names in the order drawn.
    """
    keys = {name: math.log(1 - rng.random()) / max(weights[name], 1e-9) for name in sorted(weights)}
    return sorted(keys, key=lambda name: (keys[name], name), reverse=True)[:size]
