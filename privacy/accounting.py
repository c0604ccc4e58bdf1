"""What a sequence of noised steps costs: privacy loss distributions, composed by dp-accounting.

Koskela et al. (2020, arXiv:1906.03049) and Doroshenko et al. (2022, arXiv:2207.04380). Events compose tighter
than ε adds, so what is kept is events, and ε is computed when it is asked for.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from common.errors import AntherError
from privacy.step_kinds import Kind, merge_kinds

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

IMAGE, DEVICE = "image", "device"
ADD_OR_REMOVE_ONE = "add_or_remove_one"

# Every grid gives an upper bound. Its excess falls with the square of the interval, so that when a grid ten
# times finer changes ε by less than AGREEMENT, about a hundredth of that is left.
COARSEST = 100.0  # losses for which that is too fine promise nothing
INTERVALS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
AGREEMENT = 0.005
STRICT = 1e-5
"""A δ that is small beside one over the number of pictures or devices of most federations: a larger one is not told
alone."""
TOLERANCE = 0.005  # a solved σ gives an ε in [(1 − TOLERANCE) target, target]
TRUNCATION_DELTA = 1e-12
"""What a step with Poisson batches may cut off of them, as a probability, so that a job takes a public time
(`training.public_duration`, which proves that δ grows by just this). It is kept back of every δ, also where nothing is cut."""
MOST_AT_ONCE = 100_000  # steps: dp-accounting raises a number to the power of how many it composes
POINTS = 500_000
"""Points of all arrays of one grid, about: what ε costs to compute is bounded, whatever σ and q a server asks for. That
is half a second of a desktop's core and two of a Raspberry Pi's, and some 50 MiB; an ordinary run takes a tenth."""
LARGEST = 1000.0  # an ε above it promises nothing: not solved for, and not worth a finer grid

SAMPLING = 2.0**-60
"""Share of every δ that covers the distance between drawn and exact noise.

`privacy.noise.SecureNoise` draws exactly but gives up after 4,096 bits, with a probability under 2⁻⁴⁰⁰⁰ a number. Let γ be
that over 2⁶⁴ numbers: (1 + e^ε) γ is far below 2⁻⁶⁰ for each ε up to `LARGEST`. So if the exact mechanism is
(ε, δ − SAMPLING)-DP, the drawn one is (ε, δ)-DP."""


@dataclass(frozen=True, kw_only=True)
class PoissonGaussian:
    """Steps that each add N(0, (σC)² I) to the sum, of sensitivity C, over a Poisson batch.

    What is released is rounded to a grid, as is all that is summed (`privacy.noise`): post-processing, at no cost. With
    a sampling rate of 1 it is the Gaussian mechanism, without amplification.

    Raises:
        ValueError: a value outside its range.
    """

    noise_multiplier: float
    """σ > 0."""
    sampling_rate: float
    """q in [0, 1]: the probability with which each unit joins a step."""
    steps: int

    def __post_init__(self) -> None:
        if not 0 < self.noise_multiplier < math.inf:
            raise ValueError(f"noise_multiplier={self.noise_multiplier}: must be a number over 0")
        if not 0 <= self.sampling_rate <= 1:
            raise ValueError(f"sampling_rate={self.sampling_rate}: must lie between 0 and 1")
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: must be 1 or more")


@dataclass(frozen=True)
class NonPrivate:
    """Something was shared without noise: ε is infinite from here on."""


Mechanism = PoissonGaussian | NonPrivate


@dataclass(frozen=True)
class Guarantee:
    """(ε, δ)-differential privacy, with what it protects and against which change of the data."""

    value: float
    """ε."""
    delta: float
    unit: str = IMAGE
    relation: str = ADD_OR_REMOVE_ONE
    strict: float | None = None
    """ε at δ = `STRICT`, at most; None where `delta` is no larger, or nobody asked."""
    seen: float | None = None
    """ε against who sees which devices were asked, as the network does, for one that was asked in every round; None
    where `value` holds against them too."""

    def __str__(self) -> str:
        beside = "" if self.strict is None else f"; ε={self.strict:.3g} at δ={STRICT:g}"
        beside += "" if self.seen is None else f"; ε={self.seen:.3g} if the network sees who was asked"
        return f"ε={self.value:.3g} per {self.unit} (δ={self.delta:g}, {self.relation.replace('_', ' ')}{beside})"


def epsilon(events: Iterable[Mechanism], delta: float, unit: str = IMAGE) -> Guarantee:
    """ε of all events together, per `unit` under add/remove-one: an upper bound, tight to about 0.1 %.

    By definition it is 0 wherever δ alone covers everything, as for one step of a sampling rate of δ or less. It is
    infinite for a δ that the discretized distributions can't show (10⁻¹⁵) or that `TRUNCATION_DELTA` takes.

    Raises:
        ValueError: `delta` is not between 0 and 1.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta={delta}: must lie between 0 and 1")
    steps: Counter[tuple[float, float]] = Counter()
    uncut = delta - SAMPLING
    for event in events:
        match event:
            case NonPrivate():
                return Guarantee(math.inf, delta, unit)
            case PoissonGaussian():
                steps[event.noise_multiplier, event.sampling_rate] += event.steps
                uncut -= TRUNCATION_DELTA * event.steps * (0 < event.sampling_rate < 1)
    if uncut <= 0:
        return Guarantee(math.inf, delta, unit)
    kinds = tuple(sorted((*kind, count) for kind, count in steps.items() if kind[1]))  # q = 0 tells nothing
    return Guarantee(_composed(kinds, uncut), delta, unit)


def with_strict(found: Guarantee, events: Iterable[Mechanism]) -> Guarantee:
    """A guarantee of these events, with ε at δ = `STRICT` where its δ is larger."""
    if found.delta <= STRICT:
        return found
    return replace(found, strict=epsilon(events, STRICT, found.unit).value)


@lru_cache(maxsize=4096)
def noise_multiplier_for(
    *, epsilon: float, delta: float, sampling_rate: float, steps: int, beside: tuple[PoissonGaussian, ...] = ()
) -> float:
    """The smallest σ, by bisection on the PLD, whose ε is at most `epsilon` and at least 99.5 % of it.

    Args:
        beside: what else is released, and paid from the same ε.

    Raises:
        AntherError: no σ is meant by these numbers: `epsilon` is too large, sampling alone satisfies it, or what is
            released beside it leaves nothing.
        ValueError: a value outside its range.
    """
    if not epsilon > 0 or sampling_rate == 0:
        raise ValueError(f"{epsilon=}, {sampling_rate=}: each must be over 0")
    if epsilon > LARGEST:
        raise AntherError(f"epsilon={epsilon:g} promises nothing: ask for {LARGEST:g} or less, or for none")

    def cost(sigma: float) -> float:
        event = PoissonGaussian(noise_multiplier=sigma, sampling_rate=sampling_rate, steps=steps)
        return _epsilon([event, *beside], delta).value

    if beside and (spent := _epsilon(beside, delta)).value > (1 - 2 * TOLERANCE) * epsilon:
        raise AntherError(f"what is measured costs {spent} alone, of epsilon={epsilon:g}: measure less often")
    enough = 1.0
    while cost(enough) > epsilon:
        enough *= 2
    little = enough / 2
    while cost(little) <= epsilon:
        enough, little = little, little / 2
        if little < 2**-7:
            raise AntherError(f"delta={delta:g} allows epsilon={epsilon:g} without any noise: choose a smaller delta")
    while cost(enough) < (1 - TOLERANCE) * epsilon:
        middle = math.sqrt(little * enough)
        if cost(middle) <= epsilon:
            enough = middle
        else:
            little = middle
    return enough


_epsilon = epsilon  # under a name that no argument takes


@lru_cache(maxsize=4096)
def _composed(kinds: tuple[Kind, ...], delta: float) -> float:
    """ε of the given (σ, q, steps), on ever finer grids until two agree or a finer one would be too much work.

    Every grid gives an upper bound, so to stop early overstates ε and never understates it.
    """
    kinds = merge_kinds(kinds)
    coarser, value = math.inf, math.inf
    if (first := _first_interval(kinds)) > COARSEST:
        return math.inf
    for interval in (first, *(finer for finer in INTERVALS if finer < first)):
        level = _losses(kinds, interval)
        value = min(value, float(level.losses.get_epsilon_for_delta(delta)))
        if value > LARGEST or coarser - value <= AGREEMENT * coarser < math.inf or 10 * level.points > POINTS:
            break
        coarser = value
    clear_fft_caches()
    return value


def clear_fft_caches() -> None:
    """SciPy keeps the factors of the 16 lengths it transformed last, of real numbers and of complex ones, each as long
    as its transform: of use to nobody here, where every round has other lengths, and growing with ε. Short ones push
    them out.
    """
    import numpy as np  # not of a process that never asks for ε
    from scipy import fft

    for length in range(1, 17):
        fft.fft(np.zeros(length))
        fft.fft(np.zeros(length, dtype=complex))


def _first_interval(kinds: tuple[Kind, ...]) -> float:
    """The coarsest grid, or a coarser one if that has too many points for losses this large.

    A step's loss deviates by at most 1/σ, and what is kept of the sum of n lies within about 8 √n / σ; a single one's
    lies within 1/(2 σ²) + 40 / σ. There are two directions, of adding and of removing, and each array is composed once.
    """
    points = sum(8 * (8 * math.sqrt(steps) / sigma + 1 / (2 * sigma**2) + 40 / sigma) for sigma, _, steps in kinds)
    return INTERVALS[0] * 10.0 ** max(0, math.ceil(math.log10(max(1.0, points) / POINTS)))


class _Level(NamedTuple):
    """The privacy losses of steps on one grid, and how many points were computed for it."""

    losses: PrivacyLossDistribution
    points: int


@lru_cache(maxsize=4 * len(INTERVALS))
def _losses(kinds: tuple[Kind, ...], interval: float) -> _Level:
    """The privacy losses of all steps together, on one grid.

    Kept, and so are those of the kinds before, so that another δ or more steps of the last kind cost little.
    """
    from dp_accounting.pld import privacy_loss_distribution as pld  # slow import, so only here

    if not kinds:
        return _Level(pld.identity(interval), 0)
    sigma, rate, steps = kinds[-1]
    before, step = _losses(kinds[:-1], interval), _losses_of_step(sigma, rate, interval)
    many, rest = divmod(steps, MOST_AT_ONCE)
    these = step.self_compose(rest) if rest else pld.identity(interval)
    if many:
        these = these.compose(step.self_compose(MOST_AT_ONCE).self_compose(many))
    composed = before.losses.compose(these)
    return _Level(composed, before.points + _points(step) + _points(these) + _points(composed))


def _points(losses: PrivacyLossDistribution) -> int:
    """Entries of a distribution's arrays, in both directions."""
    return int(losses._pmf_remove.size + losses._pmf_add.size)


@lru_cache(maxsize=8)
def _losses_of_step(sigma: float, rate: float, interval: float) -> PrivacyLossDistribution:
    """Of one step: kept, since round after round adds more of the same."""
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution as pld

    return pld.from_gaussian_mechanism(
        sigma,
        value_discretization_interval=interval,
        sampling_prob=rate,
        neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
    )
