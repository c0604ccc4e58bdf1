"""Training in which all is known: its releases are formula plus noise, and each broken mechanism is found."""

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
    "adamw": replace(SMALL, optimiser="adamw"),
    "per site, two draws": replace(SMALL, per_site=True, draws=2),
    "only B": replace(SMALL, trains="b", optimiser="adamw"),
}


def simulated(device: str, number: int) -> NoiseSource:
    return SimulatedNoise(seed=0, client=device, round=number, purpose="shared")


def silent(device: str, number: int) -> NoiseSource:
    return ZeroNoise(simulated(device, number))


@pytest.mark.parametrize("kind", KINDS)
def test_without_noise_nothing_is_left(kind: str) -> None:
    """The formula of what each picture adds is that of the training loop, in every kind of job."""
    found = known_inputs.observe(KINDS[kind], silent, 0, memory=MEMORY)
    joined = [one for one in found.joined if one.any()]
    assert len(joined) >= 5
    ones = 2 * 12 if KINDS[kind].trains == "both" else 0  # of A, beside which nothing is seen
    for device, noise in enumerate(found.noise[::2]):
        assert np.sort(np.abs(noise))[: -ones or None].max() < 2e-3
        assert noise.size == 2 * 12 * SMALL.rank(device) * (2 if ones else 1)


@pytest.mark.parametrize("kind", KINDS)
def test_honest_jobs_pass(kind: str) -> None:
    found = known_inputs.checks(known_inputs.observe(KINDS[kind], simulated, 0, memory=MEMORY))
    assert min(check.p_value for check in found) > 1e-4
    of_the_grid = set() if KINDS[kind].optimiser == "adamw" else {"on the grid", "last digits", "repeats"}
    assert {check.name.partition(":")[0] for check in found} == {"noise", "batches", "batch sizes"} | of_the_grid


def test_every_audit_has_several_steps_both_optimizers_mixed_ranks_empty_batches_and_a_long_release() -> None:
    every = known_inputs.situations(2**20)
    assert {one.optimiser for one in every} == {"sgd", "adamw"}
    assert max(one.steps for one in every) == 5
    assert any(one.per_site and one.sites > 1 for one in every)
    assert any(len(set(one.ranks)) == 3 for one in every)
    assert any(one.draws > 1 for one in every)
    assert any((1 - one.sampling_rate) ** one.pictures > 0.5 for one in every)
    assert max(one.side**2 for one in every) == 2**20
