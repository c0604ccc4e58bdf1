"""Empirical lower bounds on ε: compared with exact and published values, with at most 5 % false bounds."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, norm

from privacy import accounting
from privacy.accounting import PoissonGaussian
from privacy.audit import empirical, tradeoff
from privacy.audit.empirical import Guesses

DELTA = 1e-5


def simulate_release(sigma: float, m: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return projections of one Gaussian release on m orthogonal canaries, each included with probability 1/2."""
    generator = np.random.default_rng(seed)
    included = generator.random(m) < 0.5
    return included + sigma * generator.standard_normal(m), included


def gaussian(sigma: float, rate: float = 1.0, steps: int = 1) -> PoissonGaussian:
    return PoissonGaussian(noise_multiplier=sigma, sampling_rate=rate, steps=steps)


def reference_p_value(guesses: Guesses, epsilon: float, delta: float) -> float:
    """Compute theorem 5.2 of Steinke et al. term by term."""
    m, r, v = guesses
    chance = math.exp(epsilon) / (1 + math.exp(epsilon))
    tail, alpha, partial = sum(binom.pmf(k, r, chance) for k in range(v, r + 1)), 0.0, 0.0
    for i in range(1, v + 1):
        partial += binom.pmf(v - i, r, chance)
        alpha = max(alpha, partial / i)
    return min(1.0, float(tail + 2 * m * delta * alpha))


@given(
    m=st.integers(1, 60),
    made=st.floats(0, 1),
    right=st.floats(0, 1),
    eps=st.floats(0, 5),
    delta=st.sampled_from([0.0, 1e-5, 1e-2]),
)
def test_p_value_matches_the_paper(m: int, made: float, right: float, eps: float, delta: float) -> None:
    r = round(made * m)
    guesses = Guesses(m, r, round(right * r))
    assert empirical.one_run_p_value(guesses, eps, delta) == pytest.approx(
        reference_p_value(guesses, eps, delta), abs=1e-12
    )


def test_p_value_of_randomized_response_is_exact() -> None:
    """Reporting each bit correctly with probability e^ε / (1 + e^ε) is the extreme case of ε-DP."""
    for correct in range(0, 101, 10):
        p = empirical.one_run_p_value(Guesses(100, 100, correct), 1.0, 0.0)
        assert p == pytest.approx(binom.sf(correct - 1, 100, math.e / (1 + math.e)))


@given(m=st.integers(5, 400), mu=st.floats(0.1, 3), significance=st.sampled_from([0.05, 0.001]))
def test_f_dp_does_not_refute_a_true_gaussian(m: int, mu: float, significance: float) -> None:
    """m independent bits, each seen through N(±μ/2, 1): the best guesses are correct with probability Φ(μ/2)."""
    right = int(binom.isf(significance, m, norm.cdf(mu / 2)))  # P[V ≥ right] > significance
    assert not empirical.refutes(Guesses(m, m, right), tradeoff.gaussian(mu), significance)


def test_f_dp_refutes_a_false_gaussian() -> None:
    """The test has power: leakage of μ = 1 is not consistent with μ = 1/3."""
    m, mu = 2000, 1.0
    right = int(m * norm.cdf(mu / 2))
    assert empirical.refutes(Guesses(m, m, right), tradeoff.gaussian(mu / 3), 0.05)
    assert not empirical.refutes(Guesses(m, m, right), tradeoff.gaussian(mu), 0.05)
    assert not empirical.refutes(Guesses(m, 0, 0), tradeoff.gaussian(mu), 0.05)


@given(correct=st.integers(0, 99), significance=st.floats(0.001, 0.2))
def test_bounds_grow_with_correct_guesses(correct: int, significance: float) -> None:
    fewer, more = Guesses(200, 100, correct), Guesses(200, 100, correct + 1)
    assert empirical.one_run_epsilon(fewer, DELTA, significance) <= empirical.one_run_epsilon(more, DELTA, significance)
    assert empirical.one_run_epsilon(fewer, 1e-3, significance) <= empirical.one_run_epsilon(fewer, DELTA, significance)
    inverse = tradeoff.gaussian(1.0)
    assert empirical.refutes(fewer, inverse, significance) <= empirical.refutes(more, inverse, significance)


# Medians of another implementation at 95 %: (σ, m) -> (one run, f-DP). It uses half of the canaries to choose how
# many guesses to make, and ours divides its significance among three numbers of guesses.
PUBLISHED = {(1.0, 1000): (1.3, 1.8), (1.0, 5000): (1.3, 1.9), (0.6, 1000): (2.0, 2.9), (2.0, 5000): (0.68, 0.94)}


@pytest.mark.parametrize("setting", PUBLISHED)
def test_bounds_are_near_published_ones(setting: tuple[float, int]) -> None:
    sigma, m = setting
    result = []
    for seed in range(5):
        scores, included = simulate_release(sigma, m, seed)
        result.append(
            empirical.audit(gaussian(sigma), DELTA, {"release": scores}, included, confidence=0.95, false_alarms=1e-6)
        )
    one_run, f_dp = np.median([[one.one_run, one.f_dp] for one in result], axis=0)
    expected = PUBLISHED[setting]
    assert 0.6 * expected[0] <= one_run <= 1.7 * expected[0]
    assert 0.6 * expected[1] <= f_dp <= 1.7 * expected[1]
    assert f_dp > one_run
    assert not any(one.refuted for one in result)


def test_bounds_hold_in_95_percent_of_audits() -> None:
    """Checks the bound on σ itself for 200 releases: 5 % ± 3 standard errors."""
    wrong = 0
    for seed in range(200):
        scores, included = simulate_release(0.5, 100, seed)
        guesses = [empirical.guess(scores, included, *shares) for shares in empirical.SHARES]
        significance = 0.05 / len(guesses)
        wrong += any(empirical.refutes(guesses_made, tradeoff.gaussian(2.0), significance) for guesses_made in guesses)
    assert wrong <= 200 * 0.05 + 3 * math.sqrt(200 * 0.05 * 0.95)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("rate", [0.2, 1.0])
def test_advantage_is_the_total_variation_distance(rate: float, steps: int) -> None:
    """By the densities q N(1, σ²) + (1 − q) N(0, σ²) and N(0, σ²), and for four consecutive Gaussian steps."""
    x = np.linspace(-12, 14, 400_001)
    sigma, shift = (1.5, 1.0) if steps == 1 else (1.5 / 2, 1.0)  # four steps equal one with half the noise
    missed, joined = norm.pdf(x, 0, sigma), norm.pdf(x, shift, sigma)
    distance = rate * np.trapezoid(np.maximum(joined - missed, 0), x)
    result = tradeoff.advantage(gaussian(1.5, rate, steps))
    if rate == 1 or steps == 1:
        assert distance - 1e-9 <= result <= 1.002 * distance
    else:
        assert distance < result < 4 * rate * np.trapezoid(np.maximum(norm.pdf(x, 1, 1.5) - norm.pdf(x, 0, 1.5), 0), x)


HALF = {1.0: (0.2, 20), 2.0: (0.2, 20), 4.0: (0.2, 20)}


@pytest.mark.integration
@pytest.mark.parametrize("epsilon", HALF)
def test_half_noise_is_refuted_and_honest_is_not(epsilon: float) -> None:
    """With the settings of `conf.schemas.audit` and 10,000 canaries, in 40 runs each."""
    rate, steps = HALF[epsilon]
    sigma = accounting.noise_multiplier_for(epsilon=epsilon, delta=DELTA, sampling_rate=rate, steps=steps)
    claim = gaussian(sigma, rate, steps)
    refuted = {1.0: 0, 0.5: 0}
    for seed in range(40):
        generator = np.random.default_rng(seed)
        included = generator.random(10_000) < 0.5
        for scale in refuted:
            joined = (generator.random((steps, 10_000)) < rate) & included
            seen = joined + scale * sigma * generator.standard_normal((steps, 10_000))
            guesses_made = empirical.guess_all(empirical.summed(seen, claim), included)
            refuted[scale] += empirical.refutes_each(guesses_made, claim, 1e-6 / 400)
    assert refuted == {1.0: 0, 0.5: 40}


def test_chance_excess_does_not_refute() -> None:
    """10,000 independent guesses with the share of correct ones of an honest audit of one in a thousand."""
    claim, included = gaussian(1.0), np.arange(10_000) % 2 == 0
    right = int(binom.isf(1e-3, 10_000, (1 + tradeoff.advantage(claim)) / 2))
    scores = np.where(np.arange(10_000) < right, 2.0 * included - 1, 1 - 2.0 * included)
    scores = scores * np.random.default_rng(0).random(10_000)
    result = empirical.audit(claim, DELTA, {"release": scores}, included, confidence=0.95, false_alarms=1e-6)
    assert result.guesses.correct == right
    assert result.independent >= result.claimed.value
    assert not result.refuted


def test_bounds_depend_on_noise_and_canaries() -> None:
    def bound(sigma: float, m: int) -> float:
        scores, included = simulate_release(sigma, m, 1)
        return empirical.audit(
            gaussian(sigma), DELTA, {"release": scores}, included, confidence=0.95, false_alarms=1e-6
        ).f_dp

    assert bound(0.5, 1000) > bound(1.0, 1000) > bound(3.0, 1000)
    assert bound(1.0, 3000) > bound(1.0, 100)


def test_random_guesses_give_no_bound() -> None:
    scores, included = simulate_release(1.0, 500, 0)
    result = empirical.audit(
        gaussian(1.0), DELTA, {"coins": np.zeros_like(scores)}, included, confidence=0.95, false_alarms=1e-6
    )
    assert (result.bound, result.noise_multiplier, result.refuted) == (0.0, None, False)


def test_perfect_guesses_refute_any_claim() -> None:
    included = np.arange(600) % 2 == 0
    result = empirical.audit(
        gaussian(1.0), DELTA, {"sees all": 2.0 * included - 1}, included, confidence=0.95, false_alarms=1e-6
    )
    assert result.refuted
    assert result.f_dp > 1.5 * result.claimed.value
    assert result.guesses.correct == result.guesses.made


def test_smallest_refuted_noise_gives_the_bound() -> None:
    claim = gaussian(1.0)

    def refuted(event: PoissonGaussian) -> bool:
        return event.noise_multiplier > 0.7

    assert empirical.smallest_refuted(claim, refuted) == pytest.approx(0.7, rel=0.025)
    assert empirical.smallest_refuted(replace(claim, noise_multiplier=0.1), refuted) == pytest.approx(0.7, rel=0.025)
    assert empirical.smallest_refuted(claim, lambda _: False) is None
    assert empirical.smallest_refuted(claim, lambda _: True) == 1.0 / 8


@given(st.integers(1, 5), st.floats(0.05, 0.9), st.floats(0.4, 4))
def test_likelihood_ratio_matches_densities(steps: int, rate: float, sigma: float) -> None:
    seen = np.random.default_rng(steps).normal(0.5, 2, (steps, 7))
    missed, joined = norm.pdf(seen, 0, sigma), norm.pdf(seen, 1, sigma)
    expected = np.log((1 - rate) + rate * joined / missed).sum(0)
    assert empirical.log_likelihood_ratio(seen, gaussian(sigma, rate, steps)) == pytest.approx(expected)


def test_full_sampling_orders_by_the_sum() -> None:
    seen = np.random.default_rng(0).normal(size=(4, 50))
    result = empirical.log_likelihood_ratio(seen, gaussian(1.0, 1.0, 4))
    assert np.array_equal(np.argsort(result), np.argsort(seen.sum(0)))


@pytest.mark.integration
@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0])
def test_cosines_estimate_gaussian_epsilon(sigma: float) -> None:
    """Theorem 1 of Andrew et al.: k canaries in d ≫ k dimensions, one release."""
    generator = np.random.default_rng(0)
    k, d = 400, 50_000
    directions = generator.standard_normal((k, d), np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    released = directions.sum(0) + sigma * generator.standard_normal(d, np.float32)
    cosines = directions @ released / np.linalg.norm(released)
    truth = accounting.epsilon([gaussian(sigma)], 1e-3).value
    assert empirical.cosine_epsilon(cosines, d, 1e-3) == pytest.approx(truth, rel=0.25)


def test_cosines_of_absent_clients_give_zero() -> None:
    d = 10_000
    cosines = np.random.default_rng(1).normal(0, d**-0.5, 2000)
    assert empirical.cosine_epsilon(cosines, d, 1e-2) < 0.15
