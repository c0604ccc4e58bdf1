"""Training with known inputs: releases are the formula plus noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from privacy.noise import NoiseSource, SimulatedNoise
from simulations.audit import known_inputs
from simulations.audit.canaries import ZeroNoise
from simulations.audit.known_inputs import Situation

MEMORY = 2**27
SMALL = Situation(
    name="small",
    pictures=12,
    sampling_rate=0.4,
    noise_multiplier=1.5,
    side=12,
    devices=3,
    rounds=2,
    steps=3,
    sites=2,
    ranks=(12, 4),
)
KINDS = {
    "sgd": SMALL,
    "adamw": replace(SMALL, optimizer="adamw"),
    "per site, two draws": replace(SMALL, per_site=True, draws=2),
    "only B": replace(SMALL, trains="b", optimizer="adamw"),
}


def simulated(device: str, number: int) -> NoiseSource:
    return SimulatedNoise(seed=0, client=device, round=number, purpose="shared")


def noiseless(device: str, number: int) -> NoiseSource:
    return ZeroNoise(simulated(device, number))


@pytest.mark.parametrize("kind", KINDS)
def test_residuals_without_noise_are_zero(kind: str) -> None:
    """The formula for each picture's contribution matches the training loop for every kind of job."""
    observed = known_inputs.observe(KINDS[kind], noiseless, 0, memory=MEMORY)
    joined = [contribution for contribution in observed.joined if contribution.any()]
    assert len(joined) >= 5
    ones = 2 * 12 if KINDS[kind].trains == "both" else 0  # ones of A hide small changes
    for device, noise in enumerate(observed.noise[::2]):
        assert np.sort(np.abs(noise))[: -ones or None].max() < 2e-3
        assert noise.size == 2 * 12 * SMALL.rank(device) * (2 if ones else 1)


@pytest.mark.parametrize("kind", KINDS)
def test_honest_jobs_pass(kind: str) -> None:
    checks = known_inputs.checks(known_inputs.observe(KINDS[kind], simulated, 0, memory=MEMORY))
    assert min(check.p_value for check in checks) > 1e-4
    grid_tests = set() if KINDS[kind].optimizer == "adamw" else {"on the grid", "last digits", "repeats"}
    assert {check.name.partition(":")[0] for check in checks} == {"noise", "batches", "batch sizes"} | grid_tests


def test_audits_cover_all_situations() -> None:
    """Several steps, both optimizers, mixed ranks, empty batches, a long release."""
    situations = known_inputs.situations(2**20)
    assert {situation.optimizer for situation in situations} == {"sgd", "adamw"}
    assert max(situation.steps for situation in situations) == 5
    assert any(situation.per_site and situation.sites > 1 for situation in situations)
    assert any(len(set(situation.ranks)) == 3 for situation in situations)
    assert any(situation.draws > 1 for situation in situations)
    assert any((1 - situation.sampling_rate) ** situation.pictures > 0.5 for situation in situations)
    assert max(situation.side**2 for situation in situations) == 2**20
