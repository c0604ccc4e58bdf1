"""Audit of `privacy=device`: rounds of the real `CentralDP` match the claim, and broken ones are detected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import norm

from privacy.accounting import PoissonGaussian, epsilon, noise_multiplier_for
from privacy.audit import empirical
from privacy.noise import NoiseSource, SimulatedNoise
from simulations.audit import canary_clients
from simulations.audit.canaries import ZeroNoise, draw_included
from simulations.audit.canary_clients import CanaryCohort, CanaryReleases

DELTA = 1e-5
ALARM = 1e-8
CLAIM = PoissonGaussian(
    noise_multiplier=noise_multiplier_for(epsilon=2.0, delta=DELTA, sampling_rate=1.0, steps=4),
    sampling_rate=1.0,
    steps=4,
)
COHORT = CanaryCohort(claim=CLAIM, included=draw_included(600, 3), side=60)


def simulated(number: int) -> NoiseSource:
    return SimulatedNoise(seed=0, client="server", round=number, purpose="aggregate")


def noiseless(number: int) -> NoiseSource:
    return ZeroNoise(simulated(number))


def smallest_p(released: CanaryReleases) -> float:
    return min(check.p_value for check in canary_clients.checks(released))


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("both", [False, True])
def test_round_without_noise_is_the_exact_sum(adaptive: bool, both: bool) -> None:
    released = canary_clients.run_rounds(replace(COHORT, adaptive=adaptive, trains_both=both), noiseless)
    assert released.sums.shape == (4, 60 * 60 * (1 + both))
    assert np.isnan(released.sums).sum() == 4 * 60 * both  # the ones of A
    assert np.nan_to_num(released.sums) == pytest.approx(np.tile(released.known, (4, 1)), abs=1e-3)
    assert released.known[-3600:-3000] == pytest.approx(COHORT.included.astype(float))
    assert released.known.sum() == COHORT.included.sum()
    assert released.counts == pytest.approx(np.zeros(4 * adaptive), abs=1e-3)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("both", [False, True])
def test_honest_rounds_pass(adaptive: bool, both: bool) -> None:
    released = canary_clients.run_rounds(replace(COHORT, adaptive=adaptive, trains_both=both), simulated)
    assert smallest_p(released) > 1e-4
    assert len(released.counts) == 4 * adaptive


def audit(noise: Callable[[int], NoiseSource]) -> tuple[empirical.AuditResult, float]:
    """Audit the claim, and estimate ε at δ = 0.01 from the final model."""
    released = canary_clients.run_rounds(COHORT, noise)
    scores = {"releases": empirical.log_likelihood_ratio(released.sums[:, :600], CLAIM)}
    result = empirical.audit(CLAIM, DELTA, scores, COHORT.included, confidence=0.95, false_alarms=1e-6)
    total = released.sums.sum(0)
    cosines = total[:600][COHORT.included] / np.linalg.norm(total)
    return result, empirical.cosine_epsilon(cosines, total.size, 1e-2)


def test_estimate_is_near_the_claim() -> None:
    result, estimate = audit(simulated)
    assert estimate == pytest.approx(epsilon([CLAIM], 1e-2).value, rel=0.35)
    assert 0 < result.bound < result.claimed.value
    assert not result.refuted


def test_missing_noise_is_detected() -> None:
    assert audit(noiseless)[0].refuted
    assert smallest_p(canary_clients.run_rounds(COHORT, noiseless)) == 0


def test_repeated_noise_is_detected() -> None:
    assert smallest_p(canary_clients.run_rounds(COHORT, lambda _: simulated(0))) < ALARM


@pytest.mark.integration
def test_guesses_match_total_variation_distance() -> None:
    """The probability of a correct guess is Φ(μ/2) for a Gaussian of μ = √steps / σ."""
    cohort = replace(COHORT, included=draw_included(3600, 1))
    released = canary_clients.run_rounds(cohort, simulated)
    guesses = empirical.guess_all(empirical.log_likelihood_ratio(released.sums[:, :3600], CLAIM), cohort.included)
    chance = norm.cdf(np.sqrt(CLAIM.steps) / CLAIM.noise_multiplier / 2)
    assert guesses.correct / guesses.made == pytest.approx(chance, abs=4 * 0.5 / 60)
    assert not empirical.refutes_each(guesses, CLAIM, 1e-4)
    assert empirical.refutes_each(guesses, replace(CLAIM, noise_multiplier=2 * CLAIM.noise_multiplier), 1e-4)
