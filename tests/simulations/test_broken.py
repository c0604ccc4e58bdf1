"""Each way of breaking the mechanism fails the audit, for the right reason; the honest one passes, run after run."""

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
from privacy.clipping import BoundedGradientSums
from privacy.noise import NoiseSource, SecureNoise, SimulatedNoise
from privacy.sensitivity import BoundedVectorSum, Sensitivity
from simulations.audit import batch_independence, canary_clients, known_inputs
from simulations.audit.canaries import ZeroNoise, draw_included
from simulations.audit.canary_clients import CanaryCohort
from simulations.audit.known_inputs import Situation, observe
from tests.helpers import broken_mechanisms
from training import batches
from training import cohort as training_cohort
from training.step import gradients

MEMORY = 2**27
SIGNIFICANCE = 1e-9  # what a test may have of a whole audit's false alarms
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


def of(situation: Situation, breaks: Break = lambda source: source) -> set[str]:
    seen = observe(situation, lambda *key: breaks(simulated(*key)), 0, memory=MEMORY)
    return failed(known_inputs.checks(seen))


SOURCES: Mapping[str, tuple[Situation, Break, str]] = {
    "noise × 0.7": (PLAIN, lambda source: broken_mechanisms.Scaled(source, 0.7), "noise: variance"),
    "noise × 0.5": (PLAIN, lambda source: broken_mechanisms.Scaled(source, 0.5), "noise: variance"),
    "noise × 0.35": (PLAIN, lambda source: broken_mechanisms.Scaled(source, 0.35), "noise: variance"),
    "noise 3 % low": (PLAIN, lambda source: broken_mechanisms.Scaled(source, 0.97), "noise: variance"),
    "no noise": (PLAIN, ZeroNoise, "noise: variance"),
    "second half a copy of the first": (PLAIN, broken_mechanisms.CopiedHalf, "noise: autocorrelation"),
    "repeated every 65,536 numbers": (
        LONG,
        lambda source: broken_mechanisms.Periodic(source, 65536),
        "noise: autocorrelation",
    ),
    "one noise for all steps": (STEPS, broken_mechanisms.Remembered, "noise: variance"),
    "float16 noise": (PLAIN, broken_mechanisms.InFloat16, "last digits"),
    "batches of fixed size": (PLAIN, broken_mechanisms.FixedSize, "batch sizes: variance"),
    "everybody in each batch": (PLAIN, broken_mechanisms.Everybody, "batches: distribution"),
    "no batch is empty": (FEW, broken_mechanisms.NeverEmpty, "batch sizes: distribution"),
    "batches of a seed": (PLAIN, broken_mechanisms.SeededBatches, "batches: autocorrelation"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_broken_source_fails(name: str) -> None:
    situation, breaks, finder = SOURCES[name]
    assert finder in of(situation, breaks)


@pytest.mark.parametrize("situation", [PLAIN, STEPS, FEW, LONG], ids=lambda situation: situation.name)
def test_the_honest_source_passes(situation: Situation) -> None:
    assert of(situation) == set()


@pytest.mark.parametrize("key", ["device", "round"])
def test_noise_without_the_device_or_the_round_in_its_seed_fails(key: str) -> None:
    def reused(device: str, number: int) -> NoiseSource:
        return simulated("the same", number) if key == "device" else simulated(device, 0)

    found = failed(known_inputs.checks(observe(PLAIN, reused, 0, memory=MEMORY)))
    assert {"noise: autocorrelation", "noise: between releases", "repeats"} <= found


def test_noise_that_was_rounded_to_float32_before_it_was_scaled_fails() -> None:
    """The lattice of Mironov: any release tells which sums are impossible. Of small σ it is finer than the grid."""
    rounded = broken_mechanisms.InFloat16(SecureNoise(), torch.float32)
    assert {"last digits", "equal numbers"} & failed(known_inputs.observe_source(rounded, 2**12)[1])
    assert failed(known_inputs.observe_source(SecureNoise(), 2**12)[1]) == set()


def test_noise_that_is_left_out_for_empty_batches_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    pop_noised = BoundedGradientSums.pop_noised

    def skipping(self: BoundedGradientSums, clients: Sequence[int], noises: Mapping[int, Tensor]) -> Tensor:
        drawn = {client: noise * bool(self._values[client].any()) for client, noise in noises.items()}
        return pop_noised(self, clients, drawn)

    monkeypatch.setattr(BoundedGradientSums, "pop_noised", skipping)
    assert "noise: variance" in of(FEW)


def test_sums_that_are_kept_for_the_next_step_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    pop_noised = BoundedGradientSums.pop_noised

    def keeping(self: BoundedGradientSums, clients: Sequence[int], noises: Mapping[int, Tensor]) -> Tensor:
        before = self._values[list(clients)].clone()
        found = pop_noised(self, clients, noises)
        self._values[list(clients)] = before
        return found

    monkeypatch.setattr(BoundedGradientSums, "pop_noised", keeping)
    assert "noise: along pictures that joined" in of(STEPS)
    assert of(PLAIN) == set()  # with one step there is nothing to see


def test_noise_of_a_smaller_sigma_than_the_plans_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    stddev = BoundedGradientSums.stddev
    monkeypatch.setattr(BoundedGradientSums, "stddev", lambda self, client: 0.97 * stddev(self, client))
    assert "noise: variance" in of(PLAIN)


def test_a_loop_that_takes_other_pictures_than_were_drawn_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorded batches are Poisson batches: what is left of the releases tells that others were used."""

    def everybody(self: batches.BatchSampler) -> batches.StepBatch:
        noise = self._job.noise
        assert noise is not None
        noise.poisson_batch(self._job.pictures, 0.3)
        job = replace(self._job, noise=broken_mechanisms.Everybody(noise))
        kept, self._job = self._job, job
        try:
            return poisson(self)
        finally:
            self._job = kept

    poisson = batches.BatchSampler._poisson
    monkeypatch.setattr(batches.BatchSampler, "_poisson", everybody)
    assert "noise: along pictures that did not" in of(PLAIN)


# At the level of devices.

CLAIM = PoissonGaussian(noise_multiplier=2.0, sampling_rate=1.0, steps=10)
COHORT = CanaryCohort(claim=CLAIM, included=draw_included(100, 0), side=110)


def rounds(breaks: Break = lambda source: source, cohort: CanaryCohort = COHORT) -> set[str]:
    def source(number: int) -> NoiseSource:
        return breaks(SimulatedNoise(seed=0, client="server", round=number, purpose="aggregate"))

    return failed(canary_clients.checks(canary_clients.run_rounds(cohort, source)))


@pytest.mark.parametrize("scale", [0.7, 0.5, 0.35, 0.97])
def test_too_little_noise_on_a_round_fails(scale: float) -> None:
    assert "noise: variance" in rounds(lambda source: broken_mechanisms.Scaled(source, scale))


def test_copied_noise_on_a_round_fails() -> None:
    assert "noise: autocorrelation" in rounds(broken_mechanisms.CopiedHalf)


def test_a_round_that_nobody_answered_is_noised() -> None:
    nobody = replace(COHORT, included=np.zeros(100, bool))
    assert rounds(cohort=nobody) == set()
    assert "noise: variance" in rounds(ZeroNoise, nobody)


def test_a_sum_that_is_noised_less_than_its_sensitivity_asks_for_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    noise_stddev = Sensitivity.noise_stddev
    monkeypatch.setattr(Sensitivity, "noise_stddev", lambda self, sigma: 0.97 * noise_stddev(self, sigma))
    assert "noise: variance" in rounds()


def test_a_count_without_noise_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    noised = BoundedVectorSum.noised

    def quiet(self: BoundedVectorSum, noise_multiplier: float, noise: NoiseSource) -> Tensor:
        return noised(self, noise_multiplier, noise if len(self.steps) > 1 else ZeroNoise(noise))

    adaptive = replace(COHORT, adaptive=True, claim=replace(CLAIM, steps=20), side=40)
    assert rounds(cohort=adaptive) == set()
    monkeypatch.setattr(BoundedVectorSum, "noised", quiet)
    assert "count: variance" in rounds(cohort=adaptive)


# Company.


@pytest.mark.slow
def test_arithmetic_that_depends_on_how_many_share_a_pass_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    base = load("glyphs", device="cpu")
    adapter, examples = batch_independence.chaotic(base), batch_independence.random_examples(base)

    def depending(*arguments: object, **options: object) -> tuple[Tensor, Tensor]:
        found, losses = gradients(*arguments, **options)  # type: ignore[arg-type]
        real = int((arguments[2].weights != 0).sum())  # type: ignore[attr-defined]
        return found + 1e-3 * real * found.roll(1, dims=1), losses

    honest = batch_independence.shift(base, adapter, examples, memory=2**30)
    assert batch_independence.check(honest).p_value == 1.0
    monkeypatch.setattr(training_cohort, "gradients", depending)
    assert batch_independence.check(batch_independence.shift(base, adapter, examples, memory=2**30)).p_value == 0.0


# Repeated.


@pytest.mark.slow
def test_honest_runs_pass_again_and_again() -> None:
    """200 small runs: of their tests about one in a thousand has a p-value under 0.001, and none under 10⁻⁶."""
    small = [replace(PLAIN, side=16, rounds=2), replace(STEPS, side=8, optimiser="adamw"), replace(FEW, rounds=10)]
    p_values = []
    for seed in range(200):
        for situation in small:
            seen = observe(situation, lambda *_: SecureNoise(), seed, memory=MEMORY)
            p_values += [check.p_value for check in known_inputs.checks(seen)]
    assert len(p_values) >= 200 * 45
    assert min(p_values) > 1e-6
    assert np.mean(np.array(p_values) < 1e-3) < 2e-3
