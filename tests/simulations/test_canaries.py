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

from privacy import audit
from privacy.accounting import PoissonGaussian, epsilon, noise_multiplier_for
from privacy.audit import Finding
from privacy.noise import CPU, NoiseSource, Simulated
from simulations import canaries
from simulations.audit import MEMORY, source
from simulations.canaries import LENGTH, Experiment, Silent
from training.jobs import Examples, Train
from training.trainer import train

CONFIDENCE = 0.95
CLAIM = PoissonGaussian(noise_multiplier=3.0, sampling_rate=0.5, steps=8)  # ε = 2.1 at δ = 1e-5
DELTA = 1e-5


def experiment(claim: PoissonGaussian = CLAIM, *, count: int = 1000, devices: int = 4, draws: int = 1) -> Experiment:
    return Experiment(claim=claim, clip=0.01, draws=draws, included=canaries.toss(count, 0), devices=devices)


def seen(trial: Experiment, jobs: list[Train]) -> np.ndarray:
    return canaries.seen(trial, train(canaries.network(trial), jobs, memory=MEMORY, timesteps=1))


def verdict(trial: Experiment, jobs: list[Train]) -> Finding:
    return audit.audit(trial.claim, DELTA, canaries.attacks(trial, seen(trial, jobs)), trial.included, CONFIDENCE)


honest = partial(source, "simulated", 0)


def silent(device: str, round: int) -> NoiseSource:
    return Silent(honest(device, round))


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

    def gaussian(self, size: int, device: torch.device = CPU) -> Tensor:
        return self.scale * self.inner.gaussian(size, device)


class Batches:
    """Noise of one source on Poisson batches of another."""

    release = False

    def __init__(self, noise: NoiseSource, batches: NoiseSource) -> None:
        self.noise, self.batches = noise, batches

    def poisson_batch(self, size: int, rate: float) -> Tensor:
        return self.batches.poisson_batch(size, rate)

    def gaussian(self, size: int, device: torch.device = CPU) -> Tensor:
        return self.noise.gaussian(size, device)


def noise_off(trial: Experiment) -> list[Train]:
    return canaries.jobs(trial, silent)


def noise_quartered(trial: Experiment) -> list[Train]:
    return canaries.jobs(trial, lambda *key: Scaled(honest(*key), 0.25))


def noise_multiplier_of_a_quarter(trial: Experiment) -> list[Train]:
    return [
        dataclasses.replace(
            job, privacy=dataclasses.replace(job.privacy, noise_multiplier=job.privacy.noise_multiplier / 4)
        )
        for job in canaries.jobs(trial, honest)
        if job.privacy
    ]


def clip_off(trial: Experiment) -> list[Train]:
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


def draws_as_people(trial: Experiment, draws: int = 8) -> list[Train]:
    """Each draw of a picture clipped by itself, as if it were a picture."""

    def repeated(job: Train) -> Train:
        latents, context = (values.repeat_interleave(draws, 0) for values in job.examples)
        names = tuple(f"{name}, draw {draw}" for name in job.names for draw in range(draws))
        return dataclasses.replace(job, examples=Examples(latents, context), names=names)

    return [repeated(job) for job in canaries.jobs(trial, honest)]


def noise_shared_by_devices(trial: Experiment) -> list[Train]:
    """A seed without the device in it: whoever has no canary there shows the noise to subtract."""
    return canaries.jobs(trial, lambda device, number: Batches(honest("the same", number), honest(device, number)))


def noise_shared_by_rounds(trial: Experiment) -> list[Train]:
    """A seed without the round in it."""
    return canaries.jobs(trial, lambda device, number: Batches(honest(device, 0), honest(device, number)))


MUTATIONS: list[Callable[[Experiment], list[Train]]] = [
    noise_off, noise_quartered, noise_multiplier_of_a_quarter, clip_off, draws_as_people, noise_shared_by_devices,
    noise_shared_by_rounds,
]  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_a_mutation_is_caught(mutation: Callable[[Experiment], list[Train]]) -> None:
    trial = experiment()
    found = verdict(trial, mutation(trial))
    assert found.refuted
    assert found.bound > found.claimed.value
    wanted = {"noise_shared_by_devices": "against other devices", "noise_shared_by_rounds": "against other rounds"}
    if name := wanted.get(mutation.__name__):
        assert found.attack == name


def test_a_job_that_failed_fails_the_audit() -> None:
    trial = experiment(count=64, devices=1)

    class Broken(Silent):
        def gaussian(self, size: int, device: torch.device = CPU) -> Tensor:
            raise OSError(f"no entropy for {size} numbers on {device}")

    with pytest.raises(OSError, match="no entropy"):
        seen(trial, canaries.jobs(trial, lambda *key: Broken(honest(*key))))


def device_level(noise: NoiseSource, *, clip: float = 1.0, sigma: float | None = None) -> tuple[float, Finding, float]:
    """ε per device at δ = 0.01, the audit of clip and noise, and the estimate of that ε from cosines."""
    claim = PoissonGaussian(
        noise_multiplier=noise_multiplier_for(epsilon=2.0, delta=DELTA, sampling_rate=1.0, steps=4),
        sampling_rate=1.0, steps=4,
    )  # fmt: skip
    included = canaries.toss(600, 3)
    mechanism = partial(
        canaries.clip_and_noise, clip=clip, noise_multiplier=sigma or claim.noise_multiplier, noise=noise
    )
    found = canaries.clients(mechanism, included, dimension=20_000, clip=1.0, rounds=4, seed=0)
    scores = {"releases": audit.log_likelihood_ratio(found.seen, claim)}
    finding = audit.audit(claim, DELTA, scores, included, CONFIDENCE)
    return epsilon([claim], 1e-2).value, finding, audit.cosine_epsilon(found.cosines, 20_000, 1e-2)


def simulated() -> Simulated:
    return Simulated(seed=0, client="server", round=0, purpose="aggregate")


def test_canary_clients_estimate_what_is_claimed_per_device() -> None:
    claimed, finding, estimate = device_level(simulated())
    assert estimate == pytest.approx(claimed, rel=0.35)
    assert 0 < finding.bound < finding.claimed.value


def test_canary_clients_see_missing_noise_and_a_missing_clip() -> None:
    claimed, finding, estimate = device_level(Scaled(simulated(), 0.1))
    assert finding.refuted
    assert estimate > 3 * claimed
    claimed, finding, estimate = device_level(simulated(), clip=LENGTH, sigma=0.01)
    assert finding.refuted
    assert estimate > 3 * claimed
