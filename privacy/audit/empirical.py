"""Empirical lower bounds on ε, from guesses about which canaries were included.

Each of m canaries is included with probability 1/2. The auditor sees the release, scores the canaries, guesses for some
of them, and abstains for the others. A private mechanism bounds the number of correct guesses: if more guesses are
correct, the claim is refuted.

- Canary by canary, if canaries are independent of each other, as they are under independent noise: the share of correct
  guesses is bounded by the total variation distance. This bound is the strongest; the independence is tested elsewhere.
- By (ε, δ), for any dependence: Steinke, Nasr & Jagielski (2023, arXiv:2305.08846), theorem 5.2.
- By the whole trade-off function, for any dependence: Mahloujifar, Melis & Chaudhuri (2024, arXiv:2410.22235).
- From cosines of canary clients, an estimate rather than a bound: Andrew et al. (2023, arXiv:2302.03098).

A bound detects mistakes; it never certifies an ε. A bound at 95 % confidence exceeds a true claim by chance in 1 audit
of 20. So a claim counts as refuted only at a separate significance, which is meant to be far smaller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from privacy import accounting
from privacy.accounting import Guarantee, PoissonGaussian
from privacy.audit import tradeoff
from privacy.audit.tradeoff import Inverse

# Shares of the canaries that are guessed to be in (highest scores) and out (lowest scores). The best pair depends on
# the mechanism, so all are tried, and each gets its part of the significance.
SHARES = ((1 / 4, 1 / 4), (1 / 16, 1 / 16), (1 / 4, 0.0))
_HALVINGS, _DOUBLINGS, _BISECTIONS = 3, 7, 5  # of σ, when searching for the smallest refuted one
_MAX_EPSILON = 64.0  # a larger ε can't be distinguished from it by any number of guesses


class Guesses(NamedTuple):
    """Number of canaries, of guesses about them, and of correct guesses. Field names are stored in reports."""

    canaries: int
    made: int
    correct: int


@dataclass(frozen=True)
class AuditResult:
    """Result of auditing a claim. Field names are stored in reports."""

    claim: PoissonGaussian
    claimed: Guarantee
    refuted: bool
    """Whether the claim is refuted, up to the probability of a false alarm."""
    independent: float
    """Lower bound on ε if canaries are independent of each other."""
    one_run: float
    """Lower bound on ε from the guesses and (ε, δ) only."""
    f_dp: float
    """Lower bound on ε from the whole trade-off function: ε of the smallest σ that the guesses refute."""
    noise_multiplier: float | None
    """The smallest σ that is refuted by f-DP or under independence; None if none is."""
    ceiling: float
    """`f_dp` if every guess were correct: a claim above it can't be refuted with this number of canaries."""
    attack: str
    """The attack with the most correct guesses."""
    guesses: Guesses

    @property
    def bound(self) -> float:
        return max(self.independent, self.one_run, self.f_dp)


def guess(scores: np.ndarray, included: np.ndarray, top: float, bottom: float) -> Guesses:
    """Guess "in" for the highest scores and "out" for the lowest.

    Args:
        scores: score of each canary [m].
        included: whether each canary was in, bool [m].
        top: share of canaries guessed to be in.
        bottom: share of canaries guessed to be out.
    """
    m = len(scores)
    order = np.argsort(scores, kind="stable")
    top_indices, bottom_indices = order[m - int(top * m) :], order[: int(bottom * m)]
    return Guesses(
        m, len(top_indices) + len(bottom_indices), int(included[top_indices].sum() + (~included[bottom_indices]).sum())
    )


def guess_all(scores: np.ndarray, included: np.ndarray) -> Guesses:
    """Guess "in" for every canary [m] with a positive score, and "out" for the others.

    For log-likelihood ratios this rule is correct most often. A rule that depends on which guesses are correct would
    be invalid.
    """
    return Guesses(len(scores), len(scores), int(((scores > 0) == included).sum()))


def log_likelihood_ratio(seen: np.ndarray, claim: PoissonGaussian) -> np.ndarray:
    """Sum log p(seen | in) / p(seen | out) of canaries over the steps: [steps, m] -> [m].

    `seen` is the release along a canary's direction, in units of the clip: N(joined, σ²), where the canary joined with
    probability q. It is the most powerful statistic (Neyman & Pearson, 1933).
    """
    q, variance = claim.sampling_rate, claim.noise_multiplier**2
    joined = (2 * seen - 1) / (2 * variance) + math.log(q)
    missed = math.log1p(-q) if q < 1 else -math.inf
    return np.asarray(np.logaddexp(joined, missed).sum(0))


def summed(seen: np.ndarray, claim: PoissonGaussian) -> np.ndarray:
    """Compute Σ seen − q · steps / 2: [steps, m] -> [m]. Positive if "in" is likelier than "out", for any noise."""
    return np.asarray(seen.sum(0) - claim.sampling_rate * claim.steps / 2)


def one_run_p_value(guesses: Guesses, epsilon: float, delta: float) -> float:
    """Bound the probability of this many correct guesses under (ε, δ)-DP from above (Steinke et al., theorem 5.2).

    P[V ≥ v] ≤ P[W ≥ v] + 2 m δ max_i P[v > W ≥ v − i] / i, with W ~ Binomial(r, e^ε / (e^ε + 1)).

    Args:
        guesses: m, r and v.
        epsilon: ε.
        delta: δ.
    """
    from scipy.stats import binom

    m, r, v = guesses
    chance = 1 / (1 + math.exp(-epsilon))
    beta = float(binom.sf(v - 1, r, chance))
    i = np.arange(1, v + 1)
    alpha = float(np.max((binom.sf(v - i - 1, r, chance) - beta) / i, initial=0.0))
    return min(1.0, beta + 2 * m * delta * alpha)


def one_run_epsilon(guesses: Guesses, delta: float, significance: float) -> float:
    """Return the largest ε, up to 64, that this many correct guesses refute; 0 if none.

    Args:
        guesses: counts of guesses.
        delta: δ.
        significance: probability of refuting a true ε.
    """
    low, high = 0.0, _MAX_EPSILON
    if one_run_p_value(guesses, low, delta) > significance:
        return 0.0
    for _ in range(40):
        middle = (low + high) / 2
        if one_run_p_value(guesses, middle, delta) <= significance:
            low = middle
        else:
            high = middle
    return low


def refutes(guesses: Guesses, inverse: Inverse, significance: float) -> bool:
    """Whether this many correct guesses have a probability below `significance` under a trade-off function.

    Algorithm 3 of Mahloujifar et al., for canaries that are in or out. With p_j the probability of j correct guesses,
    r_i = Σ_{j≥i} j p_j / m and h_i = Σ_{j≥i} (r − j) p_j / m are the probabilities that a random canary is guessed
    correctly or incorrectly while i or more guesses are correct. If that canary were changed, its correct guess would
    be incorrect and one fewer would be correct, hence h_{i−1} ≥ inverse(r_i). Starting from P[V ≥ v] = significance,
    r_0 + h_0 must not exceed r / m.

    Args:
        guesses: m, r and v.
        inverse: inverse trade-off function.
        significance: probability of refuting a true mechanism.
    """
    m, guessed, correct = guesses
    right, wrong = significance * correct / m, significance * (guessed - correct) / m
    for i in range(correct - 1, -1, -1):
        more = max(wrong, inverse(min(right, 1.0)))
        right += i / (guessed - i) * (more - wrong)
        wrong = more
        if right + wrong > guessed / m:
            return True
    return False


def refutes_each(guesses: Guesses, event: PoissonGaussian, significance: float) -> bool:
    """Whether this many correct independent guesses have a probability below `significance` under a mechanism.

    For any guessing rule, each guess is correct with probability (1 + advantage) / 2 at most.

    Args:
        guesses: counts of guesses.
        event: the mechanism.
        significance: probability of refuting a true mechanism.
    """
    from scipy.stats import binom

    chance = (1 + tradeoff.advantage(event)) / 2
    return bool(binom.sf(guesses.correct - 1, guesses.made, chance) <= significance)


def smallest_refuted(claim: PoissonGaussian, refuted: Callable[[PoissonGaussian], bool]) -> float | None:
    """Return the smallest σ, to 2 %, that is refuted with the claim's q and steps; None if none is.

    The search ends at 1/8 of the claim's σ: a bound there is far enough above the claim.
    """

    def holds(sigma: float) -> bool:
        return not refuted(replace(claim, noise_multiplier=sigma))

    high = claim.noise_multiplier
    for _ in range(_DOUBLINGS):
        if not holds(high):
            break
        high *= 2
    else:
        return None
    low, halvings = high / 2, 0
    if high == claim.noise_multiplier:
        while not holds(low):
            high, low, halvings = low, low / 2, halvings + 1
            if halvings == _HALVINGS:
                return high
    for _ in range(_BISECTIONS):
        middle = math.sqrt(low * high)
        if holds(middle):
            low = middle
        else:
            high = middle
    return high


def audit(
    claim: PoissonGaussian,
    delta: float,
    attacks: Mapping[str, np.ndarray],
    included: np.ndarray,
    *,
    confidence: float,
    false_alarms: float,
) -> AuditResult:
    """Audit a claim by the scores of several attacks, with a Bonferroni correction over all tests.

    Args:
        claim: the claimed mechanism.
        delta: δ at which each ε is computed.
        attacks: scores of the canaries [m] by name of the attack; positive if "in" is likelier.
        included: whether each canary was in, bool [m].
        confidence: confidence of the bounds on ε.
        false_alarms: upper bound on the probability that a true claim is refuted.
    """
    partial = {
        (name, shares): guess(scores, included, *shares) for name, scores in attacks.items() for shares in SHARES
    }
    complete = {name: guess_all(scores, included) for name, scores in attacks.items()}
    tests = 2 * len(partial) + len(complete)  # two bounds from each partial guess

    def refuted_by_f_dp(event: PoissonGaussian, significance: float, *, perfect: bool = False) -> bool:
        """Whether some guesses refute this event by f-DP, or would if all of them were correct."""
        inverse = tradeoff.inverse(event)
        return any(
            refutes(guessed._replace(correct=guessed.made) if perfect else guessed, inverse, significance)
            for guessed in partial.values()
        )

    def refuted_independently(event: PoissonGaussian, significance: float) -> bool:
        return any(refutes_each(guessed, event, significance) for guessed in complete.values())

    def epsilon(sigma: float | None) -> float:
        if sigma is None:
            return 0.0
        return accounting.epsilon([replace(claim, noise_multiplier=sigma)], delta).value

    claimed, level, strict = accounting.epsilon([claim], delta), (1 - confidence) / tests, false_alarms / tests
    one_run = max(one_run_epsilon(guessed, delta, level) for guessed in partial.values())
    sigma = smallest_refuted(claim, lambda event: refuted_by_f_dp(event, level))
    independent_sigma = smallest_refuted(claim, lambda event: refuted_independently(event, level))
    best = max(complete, key=lambda name: complete[name].correct)
    return AuditResult(
        claim=claim,
        claimed=claimed,
        refuted=refuted_by_f_dp(claim, strict)
        or refuted_independently(claim, strict)
        or any(one_run_p_value(guessed, claimed.value, delta) <= strict for guessed in partial.values()),
        independent=epsilon(independent_sigma),
        one_run=one_run,
        f_dp=epsilon(sigma),
        noise_multiplier=min((value for value in (sigma, independent_sigma) if value is not None), default=None),
        ceiling=epsilon(smallest_refuted(claim, lambda event: refuted_by_f_dp(event, level, perfect=True))),
        attack=best,
        guesses=complete[best],
    )


def cosine_epsilon(cosines: Sequence[float] | np.ndarray, dimension: int, delta: float) -> float:
    """Estimate ε from the cosines of canary clients with the release (Andrew et al., algorithms 1 and 2).

    The cosine of a canary that did not participate is N(0, 1/d); a normal distribution is fitted to the cosines of
    those that did. The estimate has no confidence level, and covers only effects that are visible to such canaries.

    Args:
        cosines: cosine of each participating canary, [canaries]; two or more.
        dimension: d, size of an update.
        delta: δ.
    """
    values = np.asarray(cosines, np.float64)
    participating = (float(values.mean()), max(float(values.std(ddof=1)), 1e-12))
    absent = (0.0, dimension**-0.5)

    def cost(epsilon: float) -> float:
        return max(
            tradeoff.hockey_stick(participating, absent, epsilon), tradeoff.hockey_stick(absent, participating, epsilon)
        )

    low, high = 0.0, 1.0
    if cost(low) <= delta:
        return 0.0
    while cost(high) > delta and high < 512:
        low, high = high, high * 2
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) > delta else (low, middle)
    return high
