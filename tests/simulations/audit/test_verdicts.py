"""Results of an audit: one failed test fails it, and it states the shortfall of noise that it detects."""

from __future__ import annotations

import math

import numpy as np
import pytest

from conf.schemas.audit import AuditConfig
from privacy.audit.goodness_of_fit import Check, shortfall
from simulations.audit import batch_independence, run
from simulations.audit.verdicts import POWER, AuditResults, NoiseTestResult, noise_test_lines, summary_line


def result(*p_values: float, numbers: int = 1000, level: str = "image", false_alarms: float = 1e-6) -> NoiseTestResult:
    checks = [Check(f"test {index}", p_value, "shown") for index, p_value in enumerate(p_values)]
    return NoiseTestResult.of("a situation", level, [np.full(numbers, 0.97)], checks, false_alarms)


@pytest.mark.parametrize(
    ("p_value", "sound"), [(1.0, True), (5.1e-7, True), (5e-7, False), (0.0, False), (math.nan, False)]
)
def test_one_failed_test_fails_the_audit(p_value: float, sound: bool) -> None:
    """Each test has its share of the false alarms."""
    tested = result(0.5, p_value)
    assert tested.sound is sound
    assert AuditResults(noise_tests=[result(0.5), tested]).sound is sound
    assert [check.name for check in tested.failed] == ([] if sound else ["test 1"])
    assert len(noise_test_lines(tested)) == (1 if sound else 2)
    assert noise_test_lines(tested)[0].startswith("ok" if sound else "FAIL")


def test_audit_states_detectable_shortfall() -> None:
    small, large, device = result(0.5, 0.5), result(0.5, numbers=10_000), result(0.5, level="device")
    assert large.shortfall == shortfall(10_000, 1e-6, POWER) < small.shortfall == shortfall(1000, 5e-7, POWER)
    company = NoiseTestResult("company", "image", 0, 1.0, [batch_independence.check(0.0)], 0.0)
    results = AuditResults(noise_tests=[small, large, device, company])
    assert results.shortfalls == {"image": large.shortfall, "device": device.shortfall}
    line = summary_line(results, 1e-6)
    assert f"{large.shortfall:.1%} per image or by {device.shortfall:.1%} per device" in line
    assert "with probability 0.999" in line
    assert "1e-06" in line
    assert small.ratio == pytest.approx(0.97)


@pytest.mark.parametrize("parts", [(10_000, 4000, 2**20), (0, 4000, 2**20), (10_000, 0, 0), (0, 0, 1024)])
def test_shares_add_up_to_the_false_alarms(parts: tuple[int, int, int]) -> None:
    config = AuditConfig()
    config.canaries.count, config.clients.count, config.noise_tests.max_length = parts
    config.noise_tests.base = None
    claims = sum(2 * 3 for count in parts[:2] if count)  # for each ε: the guesses, and the residuals
    assert run.false_alarm_share(config) * (claims + (8 if parts[2] else 0)) == pytest.approx(1e-6)


def test_dependence_between_pictures_fails() -> None:
    assert batch_independence.check(1e-5).p_value == 1.0
    assert batch_independence.check(1e-2).p_value == 0.0
    assert not NoiseTestResult("company", "image", 0, 1.0, [batch_independence.check(1e-2)], 0.0).sound
