"""The audit of `privacy=device`: rounds of the real `CentralDP` are what is claimed, and broken ones are caught."""

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


def silent(number: int) -> NoiseSource:
    return ZeroNoise(simulated(number))


def least(released: CanaryReleases) -> float:
    return min(check.p_value for check in canary_clients.checks(released))


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("both", [False, True])
def test_without_noise_a_round_is_the_exact_sum(adaptive: bool, both: bool) -> None:
    found = canary_clients.run_rounds(replace(COHORT, adaptive=adaptive, trains_both=both), silent)
    assert found.sums.shape == (4, 60 * 60 * (1 + both))
    assert np.isnan(found.sums).sum() == 4 * 60 * both  # the ones of A
    assert np.nan_to_num(found.sums) == pytest.approx(np.tile(found.known, (4, 1)), abs=1e-3)
    assert found.known[-3600:-3000] == pytest.approx(COHORT.included.astype(float))
    assert found.known.sum() == COHORT.included.sum()
    assert found.counts == pytest.approx(np.zeros(4 * adaptive), abs=1e-3)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("both", [False, True])
def test_honest_rounds_pass(adaptive: bool, both: bool) -> None:
    found = canary_clients.run_rounds(replace(COHORT, adaptive=adaptive, trains_both=both), simulated)
    assert least(found) > 1e-4
    assert len(found.counts) == 4 * adaptive


def estimated(noise: Callable[[int], NoiseSource]) -> tuple[empirical.AuditResult, float]:
    """The audit of the claim, and ε at δ = 0.01 as the final model shows it."""
    found = canary_clients.run_rounds(COHORT, noise)
    scores = {"releases": empirical.log_likelihood_ratio(found.sums[:, :600], CLAIM)}
    finding = empirical.audit(CLAIM, DELTA, scores, COHORT.included, confidence=0.95, false_alarms=1e-6)
    total = found.sums.sum(0)
    cosines = total[:600][COHORT.included] / np.linalg.norm(total)
    return finding, empirical.cosine_epsilon(cosines, total.size, 1e-2)


def test_canary_clients_show_what_is_claimed_and_no_more() -> None:
    finding, estimate = estimated(simulated)
    assert estimate == pytest.approx(epsilon([CLAIM], 1e-2).value, rel=0.35)
    assert 0 < finding.bound < finding.claimed.value
    assert not finding.refuted


def test_canary_clients_see_missing_noise() -> None:
    assert estimated(silent)[0].refuted
    assert least(canary_clients.run_rounds(COHORT, silent)) == 0


def test_the_same_noise_in_each_round_is_seen() -> None:
    assert least(canary_clients.run_rounds(COHORT, lambda _: simulated(0))) < ALARM


def test_a_guess_is_right_as_often_as_the_total_variation_distance_allows() -> None:
    """Φ(μ/2) for a Gaussian of μ = √steps / σ, as the canaries of an honest run are."""
    cohort = replace(COHORT, included=draw_included(3600, 1))
    found = canary_clients.run_rounds(cohort, simulated)
    made = empirical.guess_all(empirical.log_likelihood_ratio(found.sums[:, :3600], CLAIM), cohort.included)
    chance = norm.cdf(np.sqrt(CLAIM.steps) / CLAIM.noise_multiplier / 2)
    assert made.correct / made.made == pytest.approx(chance, abs=4 * 0.5 / 60)
    assert not empirical.refutes_each(made, CLAIM, 1e-4)
    assert empirical.refutes_each(made, replace(CLAIM, noise_multiplier=2 * CLAIM.noise_multiplier), 1e-4)
