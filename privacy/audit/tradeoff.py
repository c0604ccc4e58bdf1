"""Trade-off functions of the accounted mechanisms, which say how well two neighboring data sets can be distinguished.

Dong, Roth & Su (2019, arXiv:1905.02383). For a mechanism with output distributions P and Q on neighboring data sets, an
attacker who says "in" with probability y if the unit is in says it with probability inverse(y) or more if it is out:
inverse(y) = min Q(S) over all S with P(S) ≥ y. It is the inverse function of 1 − f, for the trade-off function f.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from privacy.accounting import PoissonGaussian

Inverse = Callable[[float], float]
"""P(S) -> minimum of Q(S)."""

INTERVAL = 1e-3  # grid of privacy losses; its rounding errors favor the mechanism, never the auditor
_MAX_LOSS = 40.0  # privacy losses beyond ± this have no effect that guesses could detect
_POINTS = 1601


def gaussian(mu: float) -> Inverse:
    """Return the inverse trade-off function of N(0, 1) and N(μ, 1): inverse(y) = Φ(Φ⁻¹(y) − μ) (eq. 6)."""
    from scipy.special import ndtr, ndtri

    return lambda y: float(ndtr(ndtri(y) - mu))


@lru_cache(maxsize=64)
def inverse(event: PoissonGaussian) -> Inverse:
    """Return a lower bound on the inverse trade-off function of an event under add/remove-one.

    As a lower bound, it keeps refutations valid.

    P(S) ≤ e^ε Q(S) + δ(ε) for every real ε and both orders of the data sets, so Q(S) ≥ e^(−ε) (y − δ(ε)).
    """
    if event.sampling_rate == 1:
        return gaussian(math.sqrt(event.steps) / event.noise_multiplier)
    epsilons = np.linspace(-_MAX_LOSS, _MAX_LOSS, _POINTS)
    deltas, factors = _deltas(event, epsilons), np.exp(-epsilons)
    return lambda y: max(0.0, float(np.max(factors * (y - deltas))))


@lru_cache(maxsize=64)
def advantage(event: PoissonGaussian) -> float:
    """Bound the total variation distance of P and Q from above; it is δ at ε = 0.

    If a unit is in with probability 1/2, a guess is correct with probability (1 + advantage) / 2 at most.
    """
    if event.sampling_rate == 1:
        return math.erf(math.sqrt(event.steps / 8) / event.noise_multiplier)  # 2 Φ(μ / 2) − 1
    return float(_deltas(event, np.zeros(1))[0])


def _deltas(event: PoissonGaussian, epsilons: np.ndarray) -> np.ndarray:
    """Bound δ(ε) of an event from above, for the order of the data sets in which it is larger."""
    from dp_accounting.pld import privacy_loss_distribution  # slow import

    loss = privacy_loss_distribution.from_gaussian_mechanism(
        event.noise_multiplier, sampling_prob=event.sampling_rate, value_discretization_interval=INTERVAL
    ).self_compose(event.steps)
    return np.asarray(loss.get_delta_for_epsilon(epsilons))


def hockey_stick(p: tuple[float, float], q: tuple[float, float], epsilon: float) -> float:
    """Compute sup P(S) − e^ε Q(S) for normal distributions P and Q.

    The supremum is reached by the S where log(p/q) − ε = a x² + b x + c > 0.

    Args:
        p: mean and standard deviation of P.
        q: mean and standard deviation of Q.
        epsilon: ε.
    """
    from scipy.stats import norm

    (m1, s1), (m0, s0) = p, q
    a = (s0**-2 - s1**-2) / 2
    b = m1 / s1**2 - m0 / s0**2
    c = (m0 / s0) ** 2 / 2 - (m1 / s1) ** 2 / 2 - math.log(s1 / s0) - epsilon

    discriminant = b * b - 4 * a * c
    if discriminant <= 0:  # p − e^ε q has the same sign everywhere
        return max(0.0, 1 - math.exp(epsilon))
    half = -(b + math.copysign(math.sqrt(discriminant), b)) / 2
    roots = sorted((c / half, half / a)) if a else [c / half]

    def mass(mean: float, deviation: float) -> float:
        """Compute the probability of S under a normal distribution."""
        low, high = norm.cdf(roots, mean, deviation), norm.sf(roots, mean, deviation)  # each exact in its own tail
        if len(roots) == 1:
            return float(high[0] if b > 0 else low[0])
        return float(low[1] - low[0] if a < 0 else low[0] + high[1])

    return max(0.0, mass(m1, s1) - math.exp(epsilon) * mass(m0, s0))
