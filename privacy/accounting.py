"""Privacy accounting: ε of a sequence of noised steps, by privacy loss distributions (PLD) of dp-accounting.

Koskela et al. (2020, arXiv:1906.03049) and Doroshenko et al. (2022, arXiv:2207.04380). Composing the distributions of
events is tighter than adding their ε, so events are stored, and ε is computed on demand.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from common.errors import AntherError
from privacy.step_kinds import StepKind, merge_kinds

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

IMAGE, DEVICE = "image", "device"
ADD_OR_REMOVE_ONE = "add_or_remove_one"

# Every grid gives an upper bound. Its excess falls with the square of the interval, so if a grid ten times finer
# changes ε by less than AGREEMENT, about a hundredth of that excess is left.
MAX_INTERVAL = 100.0  # losses that need a coarser grid give no meaningful guarantee
INTERVALS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
AGREEMENT = 0.005
STRICT_DELTA = 1e-5
"""A δ that is small compared to 1 / (number of pictures or devices) in most federations. An ε at a larger δ is always
shown together with ε at this one."""
TOLERANCE = 0.005  # ε of a solved σ lies in [(1 − TOLERANCE) target, target]
TRUNCATION_DELTA = 1e-12
"""Probability with which the Poisson batches of a step may be truncated, so that a job takes a public time.

`training.public_schedule` proves that δ grows by exactly this. It is subtracted from every δ, even if nothing is
truncated.
"""
MAX_SELF_COMPOSITION = 100_000  # steps: dp-accounting raises a number to the power of the number of compositions
MAX_POINTS = 500_000
"""Approximate limit on the points of all arrays of one grid, so that computing ε has a bounded cost for any σ and q
that a server requests: half a second of a desktop's core, two of a Raspberry Pi's, and about 50 MiB. An ordinary run
takes a tenth."""
MAX_EPSILON = 1000.0  # a larger ε is no meaningful guarantee: σ is not solved for it, and grids are not refined

SAMPLER_DELTA = 2.0**-60
"""Share of every δ that covers the distance between sampled and exact noise.

`privacy.noise.SecureNoise` samples exactly but gives up after 4,096 bits, with a probability under 2⁻⁴⁰⁰⁰ per number.
Let γ be that probability for 2⁶⁴ numbers: (1 + e^ε) γ is far below 2⁻⁶⁰ for each ε up to `MAX_EPSILON`. So if the exact
mechanism is (ε, δ − SAMPLER_DELTA)-DP, the sampled one is (ε, δ)-DP."""


@dataclass(frozen=True, kw_only=True)
class PoissonGaussian:
    """Steps that each release a sum of sensitivity C over a Poisson batch, plus N(0, (σC)² I).

    Sums and releases are rounded to a grid (`privacy.noise`), which is post-processing and costs nothing. With a
    sampling rate of 1, a step is the Gaussian mechanism without amplification.

    Raises:
        ValueError: a value is out of range.
    """

    noise_multiplier: float
    """σ > 0."""
    sampling_rate: float
    """q in [0, 1]: probability with which each unit joins a step."""
    steps: int

    def __post_init__(self) -> None:
        if not 0 < self.noise_multiplier < math.inf:
            raise ValueError(f"noise_multiplier={self.noise_multiplier}: must be positive and finite")
        if not 0 <= self.sampling_rate <= 1:
            raise ValueError(f"sampling_rate={self.sampling_rate}: must lie between 0 and 1")
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: must be 1 or more")


@dataclass(frozen=True)
class NonPrivate:
    """Release without noise; ε of any sequence that contains it is infinite."""


Mechanism = PoissonGaussian | NonPrivate


@dataclass(frozen=True)
class Guarantee:
    """(ε, δ)-differential privacy guarantee with its unit and neighboring relation."""

    value: float
    """ε."""
    delta: float
    unit: str = IMAGE
    relation: str = ADD_OR_REMOVE_ONE
    strict: float | None = None
    """Upper bound on ε at δ = `STRICT_DELTA`; None if `delta` is no larger, or if it was not computed."""
    seen: float | None = None
    """ε against an adversary who observes which devices are contacted, as the network does, for a device that is
    contacted in every round. None if `value` holds against that adversary too."""

    def __str__(self) -> str:
        details = "" if self.strict is None else f"; ε={self.strict:.3g} at δ={STRICT_DELTA:g}"
        details += "" if self.seen is None else f"; ε={self.seen:.3g} if the network sees who was asked"
        return f"ε={self.value:.3g} per {self.unit} (δ={self.delta:g}, {self.relation.replace('_', ' ')}{details})"


def epsilon(events: Iterable[Mechanism], delta: float, unit: str = IMAGE) -> Guarantee:
    """Compute ε of the composition of all events under add/remove-one: an upper bound, tight to about 0.1 %.

    By definition ε is 0 if the mechanism is (0, δ)-DP, as for one step with a sampling rate of δ or less. ε is
    infinite for a δ that the discretized distributions can't represent (10⁻¹⁵), or that `TRUNCATION_DELTA` uses up.

    Args:
        events: mechanisms in any order.
        delta: δ in (0, 1).
        unit: unit of privacy: `IMAGE` or `DEVICE`.

    Raises:
        ValueError: `delta` is not between 0 and 1.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta={delta}: must lie between 0 and 1")
    steps: Counter[tuple[float, float]] = Counter()
    uncut = delta - SAMPLER_DELTA
    for event in events:
        match event:
            case NonPrivate():
                return Guarantee(math.inf, delta, unit)
            case PoissonGaussian():
                steps[event.noise_multiplier, event.sampling_rate] += event.steps
                uncut -= TRUNCATION_DELTA * event.steps * (0 < event.sampling_rate < 1)
    if uncut <= 0:
        return Guarantee(math.inf, delta, unit)
    kinds = tuple(sorted((*kind, count) for kind, count in steps.items() if kind[1]))  # q = 0 reveals nothing
    return Guarantee(_composed_epsilon(kinds, uncut), delta, unit)


def with_strict(guarantee: Guarantee, events: Iterable[Mechanism]) -> Guarantee:
    """Return the guarantee of these events with ε at δ = `STRICT_DELTA` filled in, if its own δ is larger."""
    if guarantee.delta <= STRICT_DELTA:
        return guarantee
    return replace(guarantee, strict=epsilon(events, STRICT_DELTA, guarantee.unit).value)


@lru_cache(maxsize=4096)
def noise_multiplier_for(
    *, epsilon: float, delta: float, sampling_rate: float, steps: int, other_events: tuple[PoissonGaussian, ...] = ()
) -> float:
    """Find the smallest σ, by bisection on the PLD, whose ε is at most `epsilon` and at least 99.5 % of it.

    Args:
        epsilon: target ε of all events.
        delta: δ.
        sampling_rate: q of the Poisson batches.
        steps: number of steps with σ.
        other_events: further mechanisms charged to the same ε.

    Returns:
        The noise multiplier σ.

    Raises:
        AntherError: there is no such σ: `epsilon` is too large, sampling by itself satisfies it, or `other_events`
            exceed it.
        ValueError: a value is out of range.
    """
    if not epsilon > 0 or sampling_rate == 0:
        raise ValueError(f"{epsilon=}, {sampling_rate=}: each must be over 0")
    if epsilon > MAX_EPSILON:
        raise AntherError(f"epsilon={epsilon:g} gives no meaningful guarantee: set it to {MAX_EPSILON:g} or less")

    def cost(sigma: float) -> float:
        event = PoissonGaussian(noise_multiplier=sigma, sampling_rate=sampling_rate, steps=steps)
        return _epsilon([event, *other_events], delta).value

    if other_events and (spent := _epsilon(other_events, delta)).value > (1 - 2 * TOLERANCE) * epsilon:
        raise AntherError(f"evaluation by itself costs {spent}, of epsilon={epsilon:g}: measure less often")
    upper = 1.0
    while cost(upper) > epsilon:
        upper *= 2
    lower = upper / 2
    while cost(lower) <= epsilon:
        upper, lower = lower, lower / 2
        if lower < 2**-7:
            raise AntherError(f"delta={delta:g} allows epsilon={epsilon:g} without any noise: choose a smaller delta")
    while cost(upper) < (1 - TOLERANCE) * epsilon:
        middle = math.sqrt(lower * upper)
        if cost(middle) <= epsilon:
            upper = middle
        else:
            lower = middle
    return upper


_epsilon = epsilon  # alias for functions with a parameter `epsilon`


@lru_cache(maxsize=4096)
def _composed_epsilon(kinds: tuple[StepKind, ...], delta: float) -> float:
    """Compute ε of these kinds of steps, on finer and finer grids until two agree or the next is too expensive.

    Every grid gives an upper bound, so stopping early overstates ε and never understates it.
    """
    kinds = merge_kinds(kinds)
    coarser, value = math.inf, math.inf
    if (first := _first_interval(kinds)) > MAX_INTERVAL:
        return math.inf
    for interval in (first, *(finer for finer in INTERVALS if finer < first)):
        level = _composed_losses(kinds, interval)
        value = min(value, float(level.losses.get_epsilon_for_delta(delta)))
        if value > MAX_EPSILON or coarser - value <= AGREEMENT * coarser < math.inf or 10 * level.points > MAX_POINTS:
            break
        coarser = value
    clear_fft_caches()
    return value


def clear_fft_caches() -> None:
    """Evict SciPy's FFT caches by transforming short arrays.

    SciPy keeps the factors of the last 16 lengths, of real and of complex transforms, each as long as its transform.
    Here they are never reused, since every round has other lengths, and they grow with ε.
    """
    import numpy as np  # imported here, so that a process that never computes ε doesn't load it
    from scipy import fft

    for length in range(1, 17):
        fft.fft(np.zeros(length))
        fft.fft(np.zeros(length, dtype=complex))


def _first_interval(kinds: tuple[StepKind, ...]) -> float:
    """Return the interval of the first grid: the default, or a coarser one if losses this large need too many points.

    A step's loss deviates by at most 1/σ, and the retained range of the sum of n is about ±8 √n / σ; that of a single
    step is 1/(2 σ²) + 40 / σ. There are two directions, adding and removing, and each array is composed once.
    """
    points = sum(8 * (8 * math.sqrt(steps) / sigma + 1 / (2 * sigma**2) + 40 / sigma) for sigma, _, steps in kinds)
    return INTERVALS[0] * 10.0 ** max(0, math.ceil(math.log10(max(1.0, points) / MAX_POINTS)))


class _Level(NamedTuple):
    """Composed privacy losses of steps on one grid, and the number of points computed for them."""

    losses: PrivacyLossDistribution
    points: int


@lru_cache(maxsize=4 * len(INTERVALS))
def _composed_losses(kinds: tuple[StepKind, ...], interval: float) -> _Level:
    """Compose the privacy losses of all steps on one grid.

    Results for prefixes of `kinds` are cached too, so that another δ or more steps of the last kind are cheap.
    """
    from dp_accounting.pld import privacy_loss_distribution as pld  # slow import

    if not kinds:
        return _Level(pld.identity(interval), 0)
    sigma, rate, steps = kinds[-1]
    before, step = _composed_losses(kinds[:-1], interval), _step_losses(sigma, rate, interval)
    blocks, remainder = divmod(steps, MAX_SELF_COMPOSITION)
    repeated = step.self_compose(remainder) if remainder else pld.identity(interval)
    if blocks:
        repeated = repeated.compose(step.self_compose(MAX_SELF_COMPOSITION).self_compose(blocks))
    composed = before.losses.compose(repeated)
    return _Level(composed, before.points + _points(step) + _points(repeated) + _points(composed))


def _points(losses: PrivacyLossDistribution) -> int:
    """Count the entries of a distribution's arrays, in both directions."""
    return int(losses._pmf_remove.size + losses._pmf_add.size)


@lru_cache(maxsize=8)
def _step_losses(sigma: float, rate: float, interval: float) -> PrivacyLossDistribution:
    """Compute the privacy losses of one step. Cached, since each round adds more of the same steps."""
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution as pld

    return pld.from_gaussian_mechanism(
        sigma,
        value_discretization_interval=interval,
        sampling_prob=rate,
        neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
    )
