"""The audit of the real training loop: what is released is what the claim says, and every way of breaking it is caught.

The mutations are injected from outside, into jobs and noise sources; loop, clip and noise are those that devices run.
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
from simulations.audit.run import MEMORY, source
from training.cohort import train
from training.jobs import Examples, TrainJob

CLAIM = PoissonGaussian(noise_multiplier=3.0, sampling_rate=0.5, steps=8)  # ε = 2.1 at δ = 1e-5
DELTA = 1e-5


def experiment(claim: PoissonGaussian = CLAIM, *, count: int = 1000, devices: int = 4, draws: int = 1) -> Experiment:
    return Experiment(claim=claim, draws=draws, included=canaries.draw_included(count, 0), devices=devices)


def seen(trial: Experiment, jobs: list[TrainJob]) -> np.ndarray:
    return canaries.seen(trial, train(canaries.network(trial.side), jobs, memory=MEMORY, timesteps=1))


def verdict(trial: Experiment, jobs: list[TrainJob]) -> AuditResult:
    attacks = canaries.attacks(trial, seen(trial, jobs))
    return empirical.audit(trial.claim, DELTA, attacks, trial.included, confidence=0.95, false_alarms=0.05)


honest = partial(source, "simulated", 0)


def silent(device: str, round: int) -> NoiseSource:
    return ZeroNoise(honest(device, round))


def test_a_canary_is_one_clip_long_and_nothing_else() -> None:
    """Without noise or sampling every release is exactly the inclusion bits, whatever the true lengths."""
    trial = experiment(dataclasses.replace(CLAIM, sampling_rate=1.0, steps=2), count=90, devices=3)
    found = seen(trial, canaries.jobs(trial, silent))
    assert found.shape == (3, 2, 90)
    for device in range(3):
        wanted = trial.included & (trial.owners == device)
        assert found[device] == pytest.approx(np.tile(wanted, (2, 1)).astype(float), abs=1e-4)


@pytest.mark.parametrize("draws", [1, 3])
def test_draws_of_a_picture_are_one_unit(draws: int) -> None:
    trial = experiment(dataclasses.replace(CLAIM, sampling_rate=1.0, steps=1), count=40, devices=1, draws=draws)
    assert seen(trial, canaries.jobs(trial, silent))[0, 0] == pytest.approx(trial.included.astype(float), abs=1e-4)


def test_sampling_and_noise_are_what_is_claimed() -> None:
    trial = experiment(count=900)
    loud = seen(trial, canaries.jobs(trial, honest))
    quiet = seen(trial, canaries.jobs(trial, silent))
    assert np.isin(quiet.round(3), [0.0, 1.0]).all()
    for device in range(trial.devices):
        (own,) = np.nonzero(trial.included & (trial.owners == device))
        joined = quiet[device][:, own].round()
        assert joined.mean() == pytest.approx(0.5, abs=5 * (0.25 / joined.size) ** 0.5)
        noise = (loud - quiet)[device] / CLAIM.noise_multiplier
        assert stats.kstest(noise.flatten(), "norm").pvalue > 1e-5
    assert abs(np.corrcoef((loud - quiet).reshape(-1, 900))[np.triu_indices(32, 1)]).max() < 0.2  # 6 standard errors


def test_the_honest_loop_is_not_refuted_and_shows_something() -> None:
    trial = experiment()
    found = verdict(trial, canaries.jobs(trial, honest))
    assert not found.refuted
    assert 0.1 < found.bound < found.claimed.value < found.ceiling
    assert found.claimed == epsilon([CLAIM], DELTA)


class Scaled:
    """Noise that is too small."""

    release = False

    def __init__(self, inner: NoiseSource, scale: float) -> None:
        self.inner, self.scale = inner, scale

    def poisson_batch(self, size: int, rate: float) -> Tensor:
        return self.inner.poisson_batch(size, rate)

    def rounded_gaussian(self, size: int, stddev: float, device: torch.device = CPU) -> Tensor:
        return self.inner.rounded_gaussian(size, self.scale * stddev, device)


class Batches:
    """Noise of one source on Poisson batches of another."""

    release = False

    def __init__(self, noise: NoiseSource, batches: NoiseSource) -> None:
        self.noise, self.batches = noise, batches

    def poisson_batch(self, size: int, rate: float) -> Tensor:
        return self.batches.poisson_batch(size, rate)

    def rounded_gaussian(self, size: int, stddev: float, device: torch.device = CPU) -> Tensor:
        return self.noise.rounded_gaussian(size, stddev, device)


def noise_off(trial: Experiment) -> list[TrainJob]:
    return canaries.jobs(trial, silent)


def noise_quartered(trial: Experiment) -> list[TrainJob]:
    return canaries.jobs(trial, lambda *key: Scaled(honest(*key), 0.25))


def noise_multiplier_of_a_quarter(trial: Experiment) -> list[TrainJob]:
    return [
        dataclasses.replace(
            job, privacy=dataclasses.replace(job.privacy, noise_multiplier=job.privacy.noise_multiplier / 4)
        )
        for job in canaries.jobs(trial, honest)
        if job.privacy
    ]


def clip_off(trial: Experiment) -> list[TrainJob]:
    """The noise is meant for the clip, and the gradients, each far longer, are not clipped."""
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


def draws_as_people(trial: Experiment, draws: int = 8) -> list[TrainJob]:
    """Each draw of a picture clipped by itself, as if it were a picture."""

    def repeated(job: TrainJob) -> TrainJob:
        latents, context = (values.repeat_interleave(draws, 0) for values in job.examples)
        names = tuple(f"{name}, draw {draw}" for name in job.names for draw in range(draws))
        return dataclasses.replace(job, examples=Examples(latents, context), names=names)

    return [repeated(job) for job in canaries.jobs(trial, honest)]


def noise_shared_by_devices(trial: Experiment) -> list[TrainJob]:
    """A seed without the device in it: whoever has no canary there shows the noise to subtract."""
    return canaries.jobs(trial, lambda device, number: Batches(honest("the same", number), honest(device, number)))


def noise_shared_by_rounds(trial: Experiment) -> list[TrainJob]:
    """A seed without the round in it."""
    return canaries.jobs(trial, lambda device, number: Batches(honest(device, 0), honest(device, number)))


MUTATIONS: list[Callable[[Experiment], list[TrainJob]]] = [
    noise_off,
    noise_quartered,
    noise_multiplier_of_a_quarter,
    clip_off,
    draws_as_people,
    noise_shared_by_devices,
    noise_shared_by_rounds,
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_a_mutation_is_caught(mutation: Callable[[Experiment], list[TrainJob]]) -> None:
    trial = experiment()
    found = verdict(trial, mutation(trial))
    assert found.refuted
    assert found.bound > found.claimed.value
    if mutation is noise_shared_by_devices:
        assert found.attack == "against other devices"


def test_what_is_left_of_releases_is_the_noise() -> None:
    trial, recorded = experiment(), []

    def recording(device: str, number: int) -> RecordingSource:
        recorded.append(RecordingSource(honest(device, number)))
        return recorded[-1]

    noise, joined = canaries.residuals(trial, seen(trial, canaries.jobs(trial, recording)), recorded)
    assert min(check.p_value for check in fit.battery(noise)) > 1e-4
    for missing in joined:  # a picture is a third of σ
        assert set(np.unique(missing).round(3)) == {0.0, 0.333}
    assert fit.alignment([one + other for one, other in zip(noise, joined, strict=True)], joined, "").p_value < 1e-9


def test_a_job_that_failed_fails_the_audit() -> None:
    trial = experiment(count=64, devices=1)

    class Broken(ZeroNoise):
        def rounded_gaussian(self, size: int, stddev: float, device: torch.device = CPU) -> Tensor:
            raise OSError(f"no entropy for {size} numbers of {stddev} on {device}")

    with pytest.raises(OSError, match="no entropy"):
        seen(trial, canaries.jobs(trial, lambda *key: Broken(honest(*key))))
