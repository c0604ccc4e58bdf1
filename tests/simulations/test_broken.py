"""Each broken mechanism fails the audit by the right test; the honest one passes repeatedly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from models.base.base import load
from privacy.accounting import PoissonGaussian
from privacy.audit.goodness_of_fit import Check
from privacy.bounded_sum import BoundedSum
from privacy.dp_sgd import BoundedSums
from privacy.noise import NoiseSource, SecureNoise, SimulatedNoise
from simulations.audit import batch_independence, canary_clients, known_inputs
from simulations.audit.canaries import ZeroNoise, draw_included
from simulations.audit.canary_clients import CanaryCohort
from simulations.audit.known_inputs import Situation, observe
from tests.helpers.broken_mechanisms import (
    CopiedNoise,
    FixedSizeBatches,
    FullBatches,
    LowPrecisionNoise,
    NonEmptyBatches,
    PeriodicNoise,
    ReusedNoise,
    ScaledNoise,
    SeededBatches,
)
from training import batches
from training import cohort as training_cohort
from training.passes import gradients

MEMORY = 2**27
SIGNIFICANCE = 1e-9  # share of one test in the false alarms of an audit
PLAIN = Situation(
    name="plain",
    pictures=60,
    sampling_rate=0.3,
    noise_multiplier=1.0,
    side=60,
    devices=2,
    rounds=10,
)
STEPS = replace(PLAIN, name="steps", steps=3, side=24)
FEW = Situation(name="few", pictures=3, sampling_rate=0.2, noise_multiplier=1.0, side=16, rounds=100)
LONG = Situation(name="long", pictures=8, sampling_rate=0.5, noise_multiplier=0.5, side=400, trains="b")
Break = Callable[[NoiseSource], NoiseSource]


def simulated(device: str, number: int) -> NoiseSource:
    return SimulatedNoise(seed=0, client=device, round=number, purpose="shared")


def failed(checks: Sequence[Check]) -> set[str]:
    return {check.name for check in checks if not check.p_value > SIGNIFICANCE}


def failed_tests(situation: Situation, breaks: Break = lambda source: source) -> set[str]:
    observed = observe(situation, lambda *key: breaks(simulated(*key)), 0, memory=MEMORY)
    return failed(known_inputs.checks(observed))


SOURCES: Mapping[str, tuple[Situation, Break, str]] = {
    "noise × 0.7": (PLAIN, lambda source: ScaledNoise(source, 0.7), "noise: variance"),
    "noise × 0.5": (PLAIN, lambda source: ScaledNoise(source, 0.5), "noise: variance"),
    "noise × 0.35": (PLAIN, lambda source: ScaledNoise(source, 0.35), "noise: variance"),
    "noise 3 % low": (PLAIN, lambda source: ScaledNoise(source, 0.97), "noise: variance"),
    "no noise": (PLAIN, ZeroNoise, "noise: variance"),
    "second half a copy of the first": (PLAIN, CopiedNoise, "noise: autocorrelation"),
    "repeated every 65,536 numbers": (LONG, lambda source: PeriodicNoise(source, 65536), "noise: autocorrelation"),
    "one noise for all steps": (STEPS, ReusedNoise, "noise: variance"),
    "float16 noise": (PLAIN, LowPrecisionNoise, "last digits"),
    "batches of fixed size": (PLAIN, FixedSizeBatches, "batch sizes: variance"),
    "all pictures in each batch": (PLAIN, FullBatches, "batches: distribution"),
    "no empty batch": (FEW, NonEmptyBatches, "batch sizes: distribution"),
    "seeded batches": (PLAIN, SeededBatches, "batches: autocorrelation"),
}


@pytest.mark.integration
@pytest.mark.parametrize("name", SOURCES)
def test_broken_source_fails(name: str) -> None:
    situation, breaks, expected = SOURCES[name]
    assert expected in failed_tests(situation, breaks)


@pytest.mark.parametrize("situation", [PLAIN, STEPS, FEW, LONG], ids=lambda situation: situation.name)
def test_honest_source_passes(situation: Situation) -> None:
    assert failed_tests(situation) == set()


@pytest.mark.integration
@pytest.mark.parametrize("key", ["device", "round"])
def test_noise_seed_without_device_or_round_fails(key: str) -> None:
    def reused(device: str, number: int) -> NoiseSource:
        return simulated("the same", number) if key == "device" else simulated(device, 0)

    names = failed(known_inputs.checks(observe(PLAIN, reused, 0, memory=MEMORY)))
    assert {"noise: autocorrelation", "noise: between releases", "repeats"} <= names


def test_noise_rounded_before_scaling_fails() -> None:
    """The float32 lattice of Mironov (2012) shows which sums are impossible. It is coarse for large σ only."""
    rounded = LowPrecisionNoise(SecureNoise(), torch.float32)
    assert {"last digits", "equal numbers"} & failed(known_inputs.observe_source(rounded, 2**12)[1])
    assert failed(known_inputs.observe_source(SecureNoise(), 2**12)[1]) == set()


def test_empty_batch_without_noise_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    pop_noised = BoundedSums.pop_noised

    def skipping(self: BoundedSums, clients: Sequence[int], noises: Mapping[int, Tensor]) -> Tensor:
        applied = {client: noise * bool(self._values[client].any()) for client, noise in noises.items()}
        return pop_noised(self, clients, applied)

    monkeypatch.setattr(BoundedSums, "pop_noised", skipping)
    assert "noise: variance" in failed_tests(FEW)


def test_sums_kept_for_the_next_step_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    pop_noised = BoundedSums.pop_noised

    def keeping(self: BoundedSums, clients: Sequence[int], noises: Mapping[int, Tensor]) -> Tensor:
        before = self._values[list(clients)].clone()
        noised = pop_noised(self, clients, noises)
        self._values[list(clients)] = before
        return noised

    monkeypatch.setattr(BoundedSums, "pop_noised", keeping)
    assert "noise: along pictures that joined" in failed_tests(STEPS)
    assert failed_tests(PLAIN) == set()  # with one step there is no difference


def test_noise_below_the_planned_sigma_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    stddev = BoundedSum.stddev
    monkeypatch.setattr(BoundedSum, "stddev", lambda self, sigma: 0.97 * stddev(self, sigma))
    assert "noise: variance" in failed_tests(PLAIN)


def test_batches_other_than_drawn_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorded batches are Poisson batches, but the residuals show that others were used."""

    def full_batch(self: batches.BatchSampler) -> batches.StepBatch:
        noise = self._job.noise
        assert noise is not None
        noise.poisson_batch(self._job.pictures, 0.3)
        honest, self._job = self._job, replace(self._job, noise=FullBatches(noise))
        try:
            return poisson(self)
        finally:
            self._job = honest

    poisson = batches.BatchSampler._poisson
    monkeypatch.setattr(batches.BatchSampler, "_poisson", full_batch)
    assert "noise: along pictures that did not" in failed_tests(PLAIN)


# Privacy per device.

CLAIM = PoissonGaussian(noise_multiplier=2.0, sampling_rate=1.0, steps=10)
COHORT = CanaryCohort(claim=CLAIM, included=draw_included(100, 0), side=110)


def failed_round_tests(breaks: Break = lambda source: source, cohort: CanaryCohort = COHORT) -> set[str]:
    def source(number: int) -> NoiseSource:
        return breaks(SimulatedNoise(seed=0, client="server", round=number, purpose="aggregate"))

    return failed(canary_clients.checks(canary_clients.run_rounds(cohort, source)))


@pytest.mark.parametrize("scale", [0.7, 0.5, 0.35, 0.97])
def test_too_little_noise_on_a_round_fails(scale: float) -> None:
    assert "noise: variance" in failed_round_tests(lambda source: ScaledNoise(source, scale))


def test_copied_noise_on_a_round_fails() -> None:
    assert "noise: autocorrelation" in failed_round_tests(CopiedNoise)


def test_round_without_replies_is_noised() -> None:
    empty = replace(COHORT, included=np.zeros(100, bool))
    assert failed_round_tests(cohort=empty) == set()
    assert "noise: variance" in failed_round_tests(ZeroNoise, empty)


def test_noise_below_sensitivity_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    stddev = BoundedSum.stddev
    monkeypatch.setattr(BoundedSum, "stddev", lambda self, sigma: 0.97 * stddev(self, sigma))
    assert "noise: variance" in failed_round_tests()


@pytest.mark.integration
def test_count_without_noise_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    add_noise = BoundedSum.add_noise

    def noiseless_count(self: BoundedSum, noise_multiplier: float, noise: NoiseSource) -> Tensor:
        return add_noise(self, noise_multiplier, noise if len(self.steps) > 1 else ZeroNoise(noise))

    adaptive = replace(COHORT, adaptive=True, claim=replace(CLAIM, steps=20), side=40)
    assert failed_round_tests(cohort=adaptive) == set()
    monkeypatch.setattr(BoundedSum, "add_noise", noiseless_count)
    assert "count: variance" in failed_round_tests(cohort=adaptive)


# Independence of the batch.


@pytest.mark.stress
def test_batch_dependent_arithmetic_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    base = load("glyphs", device="cpu")
    adapter, examples = batch_independence.chaotic_adapter(base), batch_independence.random_examples(base)

    def dependent(*arguments: object, **options: object) -> tuple[Tensor, Tensor]:
        computed, losses = gradients(*arguments, **options)  # type: ignore[arg-type]
        real = int((arguments[2].weights != 0).sum())  # type: ignore[attr-defined]
        return computed + 1e-3 * real * computed.roll(1, dims=1), losses

    honest = batch_independence.max_shift(base, adapter, examples, memory=2**30)
    assert batch_independence.check(honest).p_value == 1.0
    monkeypatch.setattr(training_cohort, "gradients", dependent)
    assert batch_independence.check(batch_independence.max_shift(base, adapter, examples, memory=2**30)).p_value == 0.0


# Repetition.


@pytest.mark.stress
def test_honest_runs_pass_repeatedly() -> None:
    """200 small runs: about one test in a thousand has a p-value under 0.001, and none under 10⁻⁶."""
    small = [replace(PLAIN, side=16, rounds=2), replace(STEPS, side=8, optimizer="adamw"), replace(FEW, rounds=10)]
    p_values = []
    for seed in range(200):
        for situation in small:
            observed = observe(situation, lambda *_: SecureNoise(), seed, memory=MEMORY)
            p_values += [check.p_value for check in known_inputs.checks(observed)]
    assert len(p_values) >= 200 * 45
    assert min(p_values) > 1e-6
    assert np.mean(np.array(p_values) < 1e-3) < 2e-3
