"""What an audit says: it fails by any one test, and says what it could have seen."""

from __future__ import annotations

import math

import numpy as np
import pytest

from conf.schemas.audit import AuditConfig
from privacy.audit.goodness_of_fit import Check, shortfall
from simulations.audit import batch_independence, run
from simulations.audit.verdicts import POWER, AuditResults, NoiseTestResult, fit_lines, summary_line


def fit(*p_values: float, numbers: int = 1000, level: str = "image", false_alarms: float = 1e-6) -> NoiseTestResult:
    checks = [Check(f"test {place}", p_value, "shown") for place, p_value in enumerate(p_values)]
    return NoiseTestResult.of("a situation", level, [np.full(numbers, 0.97)], checks, false_alarms)


@pytest.mark.parametrize(
    ("p_value", "sound"), [(1.0, True), (5.1e-7, True), (5e-7, False), (0.0, False), (math.nan, False)]
)
def test_one_test_of_a_situation_fails_it_at_its_share(p_value: float, sound: bool) -> None:
    found = fit(0.5, p_value)
    assert found.sound is sound
    assert AuditResults(fits=[fit(0.5), found]).sound is sound
    assert [check.name for check in found.failed] == ([] if sound else ["test 1"])
    assert len(fit_lines(found)) == (1 if sound else 2)
    assert fit_lines(found)[0].startswith("ok" if sound else "FAIL")


def test_an_audit_says_which_shortfall_it_sees() -> None:
    small, large, device = fit(0.5, 0.5), fit(0.5, numbers=10_000), fit(0.5, level="device")
    assert large.shortfall == shortfall(10_000, 1e-6, POWER) < small.shortfall == shortfall(1000, 5e-7, POWER)
    results = AuditResults(
        fits=[small, large, device, NoiseTestResult("company", "image", 0, 1.0, [batch_independence.check(0.0)], 0.0)]
    )
    assert results.shortfalls == {"image": large.shortfall, "device": device.shortfall}
    told = summary_line(results, 1e-6)
    assert f"{large.shortfall:.1%} per image or by {device.shortfall:.1%} per device" in told
    assert "with probability 0.999" in told
    assert "1e-06" in told
    assert small.ratio == pytest.approx(0.97)


@pytest.mark.parametrize("parts", [(10_000, 4000, 2**20), (0, 4000, 2**20), (10_000, 0, 0), (0, 0, 1024)])
def test_the_shares_of_a_whole_audit_add_up_to_its_false_alarms(parts: tuple[int, int, int]) -> None:
    config = AuditConfig()
    config.canaries.count, config.clients.count, config.fits.longest = parts
    config.fits.base = None
    claims = sum(2 * 3 for count in parts[:2] if count)  # of each ε: guesses, and what is left of the releases
    assert run.share(config) * (claims + (8 if parts[2] else 0)) == pytest.approx(1e-6)


def test_a_picture_that_moves_what_others_add_fails() -> None:
    assert batch_independence.check(1e-5).p_value == 1.0
    assert batch_independence.check(1e-2).p_value == 0.0
    assert not NoiseTestResult("company", "image", 0, 1.0, [batch_independence.check(1e-2)], 0.0).sound
