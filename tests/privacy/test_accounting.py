"""ε compared with known values, another accountant, and a closed form."""

from __future__ import annotations

import ctypes
import math
import time
from dataclasses import replace
from typing import ClassVar

import dp_accounting
import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import fft

from common.errors import AntherError
from privacy import accounting
from privacy.accounting import (
    SAMPLER_DELTA,
    TRUNCATION_DELTA,
    Guarantee,
    NonPrivate,
    PoissonGaussian,
    clear_fft_caches,
    epsilon,
    noise_multiplier_for,
    with_strict,
)
from privacy.policy import Policy
from tests.helpers.samples import sampled


def events(sigma: float, rate: float, steps: int) -> list[PoissonGaussian]:
    return [PoissonGaussian(noise_multiplier=sigma, sampling_rate=rate, steps=steps)]


KNOWN = [
    (10 / 50, 50, 1e-3, {1: 3.82, 4: 1.41, 8: 0.93}),
    (16 / 200, 200, 1e-3, {1: 3.07, 4: 1.19, 8: 0.84}),
    (32 / 1000, 500, 1e-4, {1: 2.44, 4: 0.99, 8: 0.74}),
    (1.0, 5, 1e-3, {1: 5.76, 4: 1.84, 8: 1.07}),
]


@pytest.mark.integration
@pytest.mark.parametrize(
    ("rate", "steps", "delta", "sigmas"),
    sampled(KNOWN, [KNOWN[0], KNOWN[-1]]),
)
def test_known_noise_multipliers(rate: float, steps: int, delta: float, sigmas: dict[int, float]) -> None:
    """σ for ε = 1, 4, 8, computed independently of this code."""
    for target, sigma in sigmas.items():
        assert epsilon(events(sigma, rate, steps), delta).value == pytest.approx(target, rel=0.05)
    target, sigma = list(sigmas.items())[-1]  # `test_solved_noise_meets_target_tightly` solves others
    found = noise_multiplier_for(epsilon=target, delta=delta, sampling_rate=rate, steps=steps)
    assert found == pytest.approx(sigma, rel=0.05)


def test_full_sampling_is_the_gaussian_mechanism() -> None:
    """Balle and Wang (2018, arXiv:1805.06530), theorem 8: δ = Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ), μ = √T/σ."""
    sigma, steps, delta = 2.0, 9, 1e-5
    result, mu = epsilon(events(sigma, 1.0, steps), delta).value, math.sqrt(steps) / sigma

    def normal(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    assert normal(mu / 2 - result / mu) - math.exp(result) * normal(-mu / 2 - result / mu) == pytest.approx(
        delta, rel=0.01
    )


@pytest.mark.integration
@pytest.mark.parametrize(("sigma", "rate", "steps", "delta"), [(1.0, 0.2, 50, 1e-3), (0.84, 0.08, 200, 1e-3)])
def test_agrees_with_opacus(sigma: float, rate: float, steps: int, delta: float) -> None:
    from opacus.accountants import PRVAccountant, RDPAccountant

    prv, rdp = PRVAccountant(), RDPAccountant()
    prv.history = rdp.history = [(sigma, rate, steps)]
    result = epsilon(events(sigma, rate, steps), delta).value
    assert result == pytest.approx(prv.get_epsilon(delta), rel=0.01)
    assert result <= rdp.get_epsilon(delta)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("target", "rate", "steps", "delta"),
    sampled(
        [(8, 1.0, 10, 1e-3), (1, 0.1, 50, 1e-5), (8, 0.25, 100, 1e-3), (2, 0.25, 100, 1e-3)],
        [(1, 0.1, 50, 1e-5), (8, 0.25, 100, 1e-3)],
    ),
)
def test_sigma_matches_dp_accounting(target: float, rate: float, steps: int, delta: float) -> None:
    """dp-accounting charges ε for our σ, and more for 0.5 % less noise, over its own PLD on a grid of 1e-4."""

    def expected(sigma: float) -> float:
        accountant = PLDAccountant(
            dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=1e-4
        )
        step = dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(sigma))
        return float(accountant.compose(step, steps).get_epsilon(delta))

    result = noise_multiplier_for(epsilon=target, delta=delta, sampling_rate=rate, steps=steps)
    assert expected(1.005 * result) < target < expected(0.995 * result)


@pytest.mark.integration
@settings(max_examples=10)  # an example composes two accountants
@given(st.floats(0.7, 20), st.floats(0.01, 1.0), st.integers(1, 200), st.sampled_from([1e-3, 1e-6]))
def test_renyi_accounting_is_an_upper_bound(sigma: float, rate: float, steps: int, delta: float) -> None:
    from opacus.accountants import RDPAccountant

    renyi = RDPAccountant()
    renyi.history = [(sigma, rate, steps)]
    assert epsilon(events(sigma, rate, steps), delta).value <= 1.005 * renyi.get_epsilon(delta) + 1e-4


def test_composition_of_halves_is_the_whole() -> None:
    half, whole = events(2.0, 0.2, 25), events(2.0, 0.2, 50)
    assert epsilon(half + half, 1e-3).value == epsilon(whole, 1e-3).value
    assert epsilon(half, 1e-3).value < epsilon(whole, 1e-3).value < 2 * epsilon(half, 1e-3).value


def test_composition_is_independent_of_order() -> None:
    mixed = events(2.0, 0.2, 25) + events(1.0, 0.05, 10)
    assert epsilon(mixed, 1e-3).value == epsilon(mixed[::-1], 1e-3).value > epsilon(mixed[:1], 1e-3).value


@pytest.mark.integration
@settings(max_examples=6)  # an example accounts for three mechanisms
@given(st.floats(0.5, 20), st.floats(0.01, 0.9), st.integers(1, 200), st.floats(1.05, 2), st.sampled_from([1e-3, 1e-6]))
def test_epsilon_is_monotonic(sigma: float, rate: float, steps: int, factor: float, delta: float) -> None:
    cost = epsilon(events(sigma, rate, steps), delta).value
    slack = 1.002 * cost + 1e-4  # between two upper bounds on different grids
    assert epsilon(events(sigma * factor, rate, steps), delta).value <= slack
    assert cost <= 1.002 * epsilon(events(sigma, min(1.0, rate * factor), steps), delta).value + 1e-4
    assert cost <= 1.002 * epsilon(events(sigma, rate, steps + 10), delta).value + 1e-4


def test_empty_and_non_private_ledgers() -> None:
    assert epsilon([], 1e-3) == Guarantee(0.0, 1e-3)
    assert epsilon(events(1.0, 0.0, 10), 1e-3).value == 0
    assert epsilon([*events(5.0, 0.1, 1), NonPrivate()], 1e-3).value == math.inf


def test_minimum_noise_is_accounted_fast() -> None:
    start = time.process_time()
    assert epsilon(events(Policy().min_noise_multiplier, 0.5, Policy().max_steps), 1e-3).value > 1000
    assert time.process_time() - start < 10


@pytest.mark.integration
@pytest.mark.parametrize(
    ("target", "delta", "rate", "steps"),
    [
        (0.1, 1e-5, 0.1, 10),
        (1, 1e-3, 0.5, 24),
        (8, 1e-3, 0.2, 24),
        (8, 1e-3, 1.0, 1),
        (100, 1e-3, 0.8, 48),
        (3, 1e-6, 0.01, 5000),
    ],
)
def test_solved_noise_meets_target_tightly(target: float, delta: float, rate: float, steps: int) -> None:
    sigma = noise_multiplier_for(epsilon=target, delta=delta, sampling_rate=rate, steps=steps)
    assert 0.995 * target <= epsilon(events(sigma, rate, steps), delta).value <= target


@pytest.mark.integration
def test_unsolvable_targets_raise() -> None:
    with pytest.raises(AntherError, match="no meaningful guarantee"):
        noise_multiplier_for(epsilon=1e6, delta=1e-3, sampling_rate=0.5, steps=10)
    with pytest.raises(AntherError, match="smaller delta"):
        noise_multiplier_for(epsilon=1, delta=0.5, sampling_rate=1e-4, steps=1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"noise_multiplier": 0.0},
        {"noise_multiplier": math.nan},
        {"noise_multiplier": math.inf},
        {"sampling_rate": 1.1},
        {"sampling_rate": math.nan},
        {"steps": 0},
    ],
)
def test_invalid_events_are_rejected(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PoissonGaussian(**({"noise_multiplier": 1.0, "sampling_rate": 0.5, "steps": 1} | wrong))  # type: ignore[arg-type]


@pytest.mark.parametrize("delta", [0.0, 1.0, math.nan])
def test_delta_must_be_a_probability(delta: float) -> None:
    with pytest.raises(ValueError, match="delta"):
        epsilon([], delta)


def test_printed_epsilon_has_unit_and_delta() -> None:
    assert str(Guarantee(2.355, 1e-5)) == "ε=2.35 per image (δ=1e-05, add or remove one)"


def test_large_delta_is_shown_with_strict_delta() -> None:
    event = PoissonGaussian(noise_multiplier=1.0, sampling_rate=0.2, steps=50)
    guarantee = with_strict(epsilon([event], 1e-3), [event])
    assert guarantee.strict == epsilon([event], 1e-5).value > guarantee.value
    assert (
        str(guarantee)
        == f"ε={guarantee.value:.3g} per image (δ=0.001, add or remove one; ε={guarantee.strict:.3g} at δ=1e-05)"
    )
    assert with_strict(small := epsilon([event], 1e-5), [event]) is small


def test_extreme_deltas() -> None:
    event = PoissonGaussian(noise_multiplier=1.0, sampling_rate=1e-4, steps=1)
    assert epsilon([event], 1e-4).value == 0  # a unit is in any step with probability δ only
    assert epsilon([replace(event, sampling_rate=1e-3)], 1e-4).value > 0
    assert epsilon([replace(event, sampling_rate=0.5)], 1e-16).value == math.inf


class _MallocInfo(ctypes.Structure):
    _fields_: ClassVar = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


@pytest.mark.parametrize("kind", [float, complex])
def test_fft_caches_are_freed(kind: type) -> None:
    """The factors of a plan of 2¹⁸ points take megabytes, which must be returned to the C library."""
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError, TypeError):
        pytest.skip("the C library doesn't report its memory in use")
    mallinfo.restype = _MallocInfo

    def used() -> int:
        info = mallinfo()
        return info.uordblks + info.hblkhd

    clear_fft_caches()
    before = used()
    fft.fft(np.zeros(2**18, dtype=kind))
    if used() - before < 2**20:
        pytest.skip("this SciPy keeps nothing")
    clear_fft_caches()
    assert used() - before < 2**17


def test_truncation_is_subtracted_from_delta() -> None:
    """Tested at a δ of that size. Nothing is subtracted if every unit joins every batch."""
    few, many = (PoissonGaussian(noise_multiplier=2.0, sampling_rate=0.5, steps=steps) for steps in (1, 10))
    reserved_delta = 10 * TRUNCATION_DELTA
    assert epsilon([many], reserved_delta).value == math.inf
    assert epsilon([few] * 10, reserved_delta).value == math.inf
    assert epsilon([few] * 10, 2 * reserved_delta).value == epsilon([many], 2 * reserved_delta).value < math.inf
    assert epsilon([many], 2 * reserved_delta).value > epsilon([many], 20 * reserved_delta).value
    everybody = PoissonGaussian(noise_multiplier=20.0, sampling_rate=1.0, steps=10)
    assert epsilon([everybody], reserved_delta).value < math.inf


def test_sampler_error_is_subtracted_from_delta(monkeypatch: pytest.MonkeyPatch) -> None:
    assert epsilon(events(2.0, 1.0, 1), SAMPLER_DELTA).value == math.inf
    without = epsilon(events(2.125, 1.0, 1), 4e-6).value
    monkeypatch.setattr(accounting, "SAMPLER_DELTA", 4e-6)
    assert epsilon(events(2.125, 1.0, 1), 8e-6).value == pytest.approx(without, rel=1e-9)
