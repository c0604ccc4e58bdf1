"""How private a mechanism is at best, from guesses about what went in.

m canaries each go in with probability 1/2. Whoever sees what is released scores them, guesses for some, and abstains
for the rest. A private mechanism allows only so many correct guesses: more of them refute the claim.

- One canary at a time, if canaries don't depend on each other, as under independent noise they do not: the share of
  right guesses is bounded by the total variation distance. It sees most, and the independence is tested elsewhere.
- With (ε, δ), whatever depends on what: Steinke, Nasr & Jagielski (2023, arXiv:2305.08846), theorem 5.2.
- With the whole trade-off function, as generally: Mahloujifar, Melis & Chaudhuri (2024, arXiv:2410.22235).
- From cosines of canary clients, an estimate rather than a bound: Andrew et al. (2023, arXiv:2302.03098).

A bound catches mistakes; it never certifies an ε. One above the claim, at 95 %, comes by chance in 1 audit of 20: so a
claim is called refuted only at a significance of its own, which is meant to be far smaller.
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

# Shares of the canaries, of highest score said to be in and of lowest said to be out. Which of them shows most depends
# on the mechanism, so all are tried, and each has its part of the significance.
SHARES = ((1 / 4, 1 / 4), (1 / 16, 1 / 16), (1 / 4, 0.0))
_HALVINGS, _DOUBLINGS, _BISECTIONS = 3, 7, 5  # of σ, in search of the smallest one that is refuted
_LARGEST = 64.0  # an ε that no number of guesses tells from a larger one


class Guesses(NamedTuple):
    """Of `canaries`, each in with probability 1/2, about some a guess was `made`, and was `correct`."""

    canaries: int
    made: int
    correct: int


@dataclass(frozen=True)
class AuditResult:
    """What an audit found out about a claim."""

    claim: PoissonGaussian
    claimed: Guarantee
    refuted: bool
    """Whether the claim can't be true, but for a false alarm."""
    independent: float
    """ε is at least this, if canaries are independent of each other."""
    one_run: float
    """ε is at least this, by the guesses and (ε, δ) alone."""
    f_dp: float
    """The same by the whole trade-off function: ε of the smallest σ that the guesses refute."""
    noise_multiplier: float | None
    """The smallest σ that is refuted in either way; None if none is."""
    ceiling: float
    """What f-DP would show were every guess right: a claim above it can't be refuted with so few canaries."""
    attack: str
    """Whose guesses showed most."""
    guesses: Guesses

    @property
    def bound(self) -> float:
        return max(self.independent, self.one_run, self.f_dp)


def guess(scores: np.ndarray, included: np.ndarray, top: float, bottom: float) -> Guesses:
    """Guess "in" for the share `top` of highest score [m], "out" for the share `bottom` of lowest."""
    m = len(scores)
    order = np.argsort(scores, kind="stable")
    ins, outs = order[m - int(top * m) :], order[: int(bottom * m)]
    return Guesses(m, len(ins) + len(outs), int(included[ins].sum() + (~included[outs]).sum()))


def guess_all(scores: np.ndarray, included: np.ndarray) -> Guesses:
    """Guess "in" for every canary [m] whose score is over 0.

    Of log-likelihood ratios no rule is right more often. A rule that looked at the guesses would be no fair one.
    """
    return Guesses(len(scores), len(scores), int(((scores > 0) == included).sum()))


def log_likelihood_ratio(seen: np.ndarray, claim: PoissonGaussian) -> np.ndarray:
    """log p(seen | in) / p(seen | out) of canaries, summed over the steps: [steps, m] -> [m].

    `seen` is what was released along a canary's direction, in units of the clip: N(joined, σ²), where it joined with
    probability q. No other function of it tells in from out better (Neyman & Pearson, 1933).
    """
    q, variance = claim.sampling_rate, claim.noise_multiplier**2
    joined = (2 * seen - 1) / (2 * variance) + math.log(q)
    missed = math.log1p(-q) if q < 1 else -math.inf
    return np.asarray(np.logaddexp(joined, missed).sum(0))


def summed(seen: np.ndarray, claim: PoissonGaussian) -> np.ndarray:
    """Σ seen − q · steps / 2: [steps, m] -> [m]. Over 0 where a canary is in rather than out, whatever the noise."""
    return np.asarray(seen.sum(0) - claim.sampling_rate * claim.steps / 2)


def one_run_p_value(guesses: Guesses, epsilon: float, delta: float) -> float:
    """Probability, at most, of so many correct guesses under (ε, δ)-DP (Steinke et al., theorem 5.2).

    P[V ≥ v] ≤ P[W ≥ v] + 2 m δ max_i P[v > W ≥ v − i] / i, with W ~ Binomial(r, e^ε / (e^ε + 1)).
    """
    from scipy.stats import binom

    m, r, v = guesses
    chance = 1 / (1 + math.exp(-epsilon))
    beta = float(binom.sf(v - 1, r, chance))
    i = np.arange(1, v + 1)
    alpha = float(np.max((binom.sf(v - i - 1, r, chance) - beta) / i, initial=0.0))
    return min(1.0, beta + 2 * m * delta * alpha)


def one_run_epsilon(guesses: Guesses, delta: float, significance: float) -> float:
    """The largest ε, up to 64, that so many correct guesses refute; 0 if none."""
    low, high = 0.0, _LARGEST
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
    """Whether under this trade-off function so many guesses are correct with a probability below `significance`.

    Mahloujifar et al., algorithm 3, for canaries that are in or out. With p_j the probability of j correct guesses,
    r_i = Σ_{j≥i} j p_j / m and h_i = Σ_{j≥i} (r − j) p_j / m: a random canary is guessed, rightly or wrongly, while i
    or more guesses are right. Were that canary changed, its right guess would be a wrong one and one fewer would be
    right, hence h_{i−1} ≥ inverse(r_i). From P[V ≥ v] = significance on, r_0 + h_0 must not grow above r / m.
    """
    m, made, correct = guesses
    right, wrong = significance * correct / m, significance * (made - correct) / m
    for i in range(correct - 1, -1, -1):
        more = max(wrong, inverse(min(right, 1.0)))
        right += i / (made - i) * (more - wrong)
        wrong = more
        if right + wrong > made / m:
            return True
    return False


def refutes_each(guesses: Guesses, event: PoissonGaussian, significance: float) -> bool:
    """Whether independent guesses are right as often as they are with a probability below `significance`.

    Each is right with probability (1 + advantage) / 2 at most, however it is made.
    """
    from scipy.stats import binom

    chance = (1 + tradeoff.advantage(event)) / 2
    return bool(binom.sf(guesses.correct - 1, guesses.made, chance) <= significance)


def smallest_refuted(claim: PoissonGaussian, refuted: Callable[[PoissonGaussian], bool]) -> float | None:
    """The smallest σ, to 2 %, that is refuted with the claim's q and steps; None if none is.

    Not sought below 1/8 of the claim's: a bound that far above the claim says enough.
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
    """What the scores of some attacks show together.

    Args:
        attacks: scores [m] of the canaries, over 0 for those that are rather in, by the name of the attack.
        included: which canaries were in [m].
        confidence: of the bounds on ε.
        false_alarms: probability, at most, that a true claim is called refuted.
    """
    shared = {(name, shares): guess(scores, included, *shares) for name, scores in attacks.items() for shares in SHARES}
    single = {name: guess_all(scores, included) for name, scores in attacks.items()}
    tests = 2 * len(shared) + len(single)  # two bounds from each of the first

    def jointly(event: PoissonGaussian, significance: float, *, perfect: bool = False) -> bool:
        """Whether some guesses refute this event by f-DP, or would if all were right."""
        inverse = tradeoff.inverse(event)
        return any(
            refutes(made._replace(correct=made.made) if perfect else made, inverse, significance)
            for made in shared.values()
        )

    def singly(event: PoissonGaussian, significance: float) -> bool:
        return any(refutes_each(made, event, significance) for made in single.values())

    def epsilon(sigma: float | None) -> float:
        if sigma is None:
            return 0.0
        return accounting.epsilon([replace(claim, noise_multiplier=sigma)], delta).value

    claimed, level, strict = accounting.epsilon([claim], delta), (1 - confidence) / tests, false_alarms / tests
    one_run = max(one_run_epsilon(made, delta, level) for made in shared.values())
    sigma = smallest_refuted(claim, lambda event: jointly(event, level))
    of_each = smallest_refuted(claim, lambda event: singly(event, level))
    best = max(single, key=lambda name: single[name].correct)
    return AuditResult(
        claim=claim,
        claimed=claimed,
        refuted=jointly(claim, strict)
        or singly(claim, strict)
        or any(one_run_p_value(made, claimed.value, delta) <= strict for made in shared.values()),
        independent=epsilon(of_each),
        one_run=one_run,
        f_dp=epsilon(sigma),
        noise_multiplier=min((found for found in (sigma, of_each) if found is not None), default=None),
        ceiling=epsilon(smallest_refuted(claim, lambda event: jointly(event, level, perfect=True))),
        attack=best,
        guesses=single[best],
    )


def cosine_epsilon(cosines: Sequence[float] | np.ndarray, dimension: int, delta: float) -> float:
    """ε estimated from the cosines of canary clients with what was released (Andrew et al., algorithms 1 and 2).

    A canary that had not taken part would have a cosine of N(0, 1/d); those that did are fitted by a normal. An
    estimate: it has no confidence, and sees only what such canaries see.
    """
    found = np.asarray(cosines, np.float64)
    taking_part = (float(found.mean()), max(float(found.std(ddof=1)), 1e-12))
    absent = (0.0, dimension**-0.5)

    def cost(epsilon: float) -> float:
        return max(
            tradeoff.hockey_stick(taking_part, absent, epsilon), tradeoff.hockey_stick(absent, taking_part, epsilon)
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
