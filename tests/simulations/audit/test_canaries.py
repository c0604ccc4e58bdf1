"""Audit of the real training loop: releases match the claim, and every mutation is caught.

Mutations are injected into jobs and noise sources; loop, clipping and noise are those that devices run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from privacy.accounting import PoissonGaussian, epsilon
from privacy.audit import empirical
from privacy.audit import goodness_of_fit as fit
from privacy.audit.empirical import AuditResult
from privacy.noise import CPU, NoiseSource
from simulations.audit import canaries
from simulations.audit.canaries import LENGTH, Experiment, RecordingSource, ZeroNoise
from simulations.audit.run import CANARY_MEMORY, noise_source
from tests.helpers.broken_mechanisms import ScaledNoise
from training.cohort import train
from training.jobs import Examples, TrainJob

CLAIM = PoissonGaussian(noise_multiplier=3.0, sampling_rate=0.5, steps=8)  # ε = 2.1 at δ = 1e-5
DELTA = 1e-5


def experiment(claim: PoissonGaussian = CLAIM, *, count: int = 1000, devices: int = 4, draws: int = 1) -> Experiment:
    return Experiment(claim=claim, draws=draws, included=canaries.draw_included(count, 0), devices=devices)


def releases(trial: Experiment, jobs: list[TrainJob]) -> np.ndarray:
    return canaries.canary_releases(trial, train(canaries.network(trial.side), jobs, memory=CANARY_MEMORY, timesteps=1))


def audit(trial: Experiment, jobs: list[TrainJob]) -> AuditResult:
    attacks = canaries.attacks(trial, releases(trial, jobs))
    return empirical.audit(trial.claim, DELTA, attacks, trial.included, confidence=0.95, false_alarms=0.05)


honest = partial(noise_source, "simulated", 0)


def noiseless(device: str, round: int) -> NoiseSource:
    return ZeroNoise(honest(device, round))


def test_canary_contributes_exactly_one_clip() -> None:
    """Without noise or sampling every release is exactly the inclusion bits, whatever the true lengths."""
    trial = experiment(dataclasses.replace(CLAIM, sampling_rate=1.0, steps=2), count=90, devices=3)
    released = releases(trial, canaries.jobs(trial, noiseless))
    assert released.shape == (3, 2, 90)
    for device in range(3):
        expected = trial.included & (trial.owners == device)
        assert released[device] == pytest.approx(np.tile(expected, (2, 1)).astype(float), abs=1e-4)


@pytest.mark.parametrize("draws", [1, 3])
def test_draws_of_a_picture_are_one_unit(draws: int) -> None:
    trial = experiment(dataclasses.replace(CLAIM, sampling_rate=1.0, steps=1), count=40, devices=1, draws=draws)
    released = releases(trial, canaries.jobs(trial, noiseless))
    assert released[0, 0] == pytest.approx(trial.included.astype(float), abs=1e-4)


def test_sampling_and_noise_are_as_claimed() -> None:
    trial = experiment(count=900)
    noisy = releases(trial, canaries.jobs(trial, honest))
    exact = releases(trial, canaries.jobs(trial, noiseless))
    assert np.isin(exact.round(3), [0.0, 1.0]).all()
    for device in range(trial.devices):
        (own,) = np.nonzero(trial.included & (trial.owners == device))
        joined = exact[device][:, own].round()
        assert joined.mean() == pytest.approx(0.5, abs=5 * (0.25 / joined.size) ** 0.5)
        noise = (noisy - exact)[device] / CLAIM.noise_multiplier
        assert stats.kstest(noise.flatten(), "norm").pvalue > 1e-5
    correlations = np.corrcoef((noisy - exact).reshape(-1, 900))[np.triu_indices(32, 1)]
    assert abs(correlations).max() < 0.2  # 6 standard errors


@pytest.mark.integration
def test_honest_loop_is_not_refuted() -> None:
    """The audit has power: its bound is well above 0."""
    trial = experiment()
    result = audit(trial, canaries.jobs(trial, honest))
    assert not result.refuted
    assert 0.1 < result.bound < result.claimed.value < result.ceiling
    assert result.claimed == epsilon([CLAIM], DELTA)


class _OtherBatches:
    """Noise source with the noise of one source and the Poisson batches of another."""

    release = False

    def __init__(self, noise: NoiseSource, batches: NoiseSource) -> None:
        self.noise, self.batches = noise, batches

    def poisson_batch(self, size: int, rate: float) -> Tensor:
        return self.batches.poisson_batch(size, rate)

    def rounded_gaussian(self, size: int, stddev: float, device: torch.device = CPU) -> Tensor:
        return self.noise.rounded_gaussian(size, stddev, device)


def no_noise(trial: Experiment) -> list[TrainJob]:
    return canaries.jobs(trial, noiseless)


def quarter_of_the_noise(trial: Experiment) -> list[TrainJob]:
    return canaries.jobs(trial, lambda *key: ScaledNoise(honest(*key), 0.25))


def quarter_of_the_noise_multiplier(trial: Experiment) -> list[TrainJob]:
    return [
        dataclasses.replace(
            job, privacy=dataclasses.replace(job.privacy, noise_multiplier=job.privacy.noise_multiplier / 4)
        )
        for job in canaries.jobs(trial, honest)
        if job.privacy
    ]


def no_clipping(trial: Experiment) -> list[TrainJob]:
    """The noise matches the clip, but the much longer gradients are not clipped."""
    return [
        dataclasses.replace(
            job,
            privacy=dataclasses.replace(
                job.privacy, clip=LENGTH * job.privacy.clip, noise_multiplier=job.privacy.noise_multiplier / LENGTH
            ),
        )
        for job in canaries.jobs(trial, honest)
        if job.privacy
    ]


def draws_clipped_separately(trial: Experiment, draws: int = 8) -> list[TrainJob]:
    """Clip each draw of a picture separately, as if it were a picture."""

    def repeated(job: TrainJob) -> TrainJob:
        latents, context = (values.repeat_interleave(draws, 0) for values in job.examples)
        names = tuple(f"{name}, draw {draw}" for name in job.names for draw in range(draws))
        return dataclasses.replace(job, examples=Examples(latents, context), names=names)

    return [repeated(job) for job in canaries.jobs(trial, honest)]


def noise_shared_by_devices(trial: Experiment) -> list[TrainJob]:
    """Seed without the device: the release of a device without the canary shows the noise to subtract."""
    return canaries.jobs(
        trial, lambda device, number: _OtherBatches(honest("the same", number), honest(device, number))
    )


def noise_shared_by_rounds(trial: Experiment) -> list[TrainJob]:
    """Seed without the round."""
    return canaries.jobs(trial, lambda device, number: _OtherBatches(honest(device, 0), honest(device, number)))


MUTATIONS: list[Callable[[Experiment], list[TrainJob]]] = [
    no_noise,
    quarter_of_the_noise,
    quarter_of_the_noise_multiplier,
    no_clipping,
    draws_clipped_separately,
    noise_shared_by_devices,
    noise_shared_by_rounds,
]


@pytest.mark.integration
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_mutation_is_caught(mutation: Callable[[Experiment], list[TrainJob]]) -> None:
    trial = experiment()
    result = audit(trial, mutation(trial))
    assert result.refuted
    assert result.bound > result.claimed.value
    if mutation is noise_shared_by_devices:
        assert result.attack == "against other devices"


def test_residuals_are_the_noise() -> None:
    trial, recorded = experiment(), []

    def recording(device: str, number: int) -> RecordingSource:
        recorded.append(RecordingSource(honest(device, number)))
        return recorded[-1]

    noise, joined = canaries.residuals(trial, releases(trial, canaries.jobs(trial, recording)), recorded)
    assert min(check.p_value for check in fit.battery(noise)) > 1e-4
    for contribution in joined:  # a picture is a third of σ
        assert set(np.unique(contribution).round(3)) == {0.0, 0.333}
    assert fit.alignment([one + other for one, other in zip(noise, joined, strict=True)], joined, "").p_value < 1e-9


def test_failed_job_fails_the_audit() -> None:
    trial = experiment(count=64, devices=1)

    class _BrokenNoise(ZeroNoise):
        def rounded_gaussian(self, size: int, stddev: float, device: torch.device = CPU) -> Tensor:
            raise OSError(f"no entropy for {size} numbers of {stddev} on {device}")

    with pytest.raises(OSError, match="no entropy"):
        releases(trial, canaries.jobs(trial, lambda *key: _BrokenNoise(honest(*key))))
