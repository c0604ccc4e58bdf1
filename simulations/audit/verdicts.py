"""Results of an audit by claim and by test, and their one-line summaries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from privacy.audit import goodness_of_fit
from privacy.audit.empirical import AuditResult
from privacy.audit.goodness_of_fit import Check
from privacy.audit.membership import FPR
from server.report.formatting import short
from simulations.audit.membership import RunGroup

POWER = 0.999
"""Probability of detecting the shortfall of noise that an audit reports as detectable."""


@dataclass(frozen=True)
class ClaimResult:
    """Result of one claim."""

    name: str
    finding: AuditResult
    honest: bool
    """Whether the claim should hold; without noise it must not."""
    estimate: float | None = None
    """Estimate of ε from canary clients."""

    @property
    def sound(self) -> bool:
        """Whether the result is the expected one."""
        return self.finding.refuted != self.honest


@dataclass(frozen=True)
class NoiseTestResult:
    """Test results of noise in one situation with known inputs."""

    name: str
    level: str
    """Privacy level of the noise: `image` or `device`."""
    numbers: int
    """Number of noise values."""
    ratio: float
    """Measured standard deviation of the noise over the claimed one."""
    checks: list[Check]
    false_alarms: float
    """Upper bound on the probability that an honest mechanism fails any check."""

    @classmethod
    def of(cls, name: str, level: str, noise: Sequence[np.ndarray], checks: list[Check], false_alarms: float) -> Self:
        """Build the result from the noise values of all releases.

        Args:
            name: name of the situation.
            level: `image` or `device`.
            noise: noise values of each release over the claimed standard deviation.
            checks: results of all tests.
            false_alarms: probability that an honest mechanism may fail any check.
        """
        numbers = sum(release.size for release in noise)
        squares = sum(float(np.square(release).sum()) for release in noise)
        return cls(name, level, numbers, math.sqrt(squares / numbers), checks, false_alarms)

    @property
    def significance(self) -> float:
        """Significance level of each test."""
        return self.false_alarms / len(self.checks)

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.p_value > self.significance]

    @property
    def sound(self) -> bool:
        return not self.failed

    @property
    def least(self) -> Check:
        """Test with the minimum p-value."""
        return min(self.checks, key=lambda check: check.p_value)

    @property
    def shortfall(self) -> float:
        """Relative shortfall of noise that the variance test detects with probability `POWER`; 1 without numbers."""
        if not self.numbers:
            return 1.0
        return goodness_of_fit.shortfall(self.numbers, self.significance, POWER)


@dataclass(frozen=True)
class AuditResults:
    """All results of an audit."""

    training_loop: list[ClaimResult] = field(default_factory=list)
    devices: list[ClaimResult] = field(default_factory=list)
    noise_tests: list[NoiseTestResult] = field(default_factory=list)
    run_groups: list[RunGroup] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether no claim was refuted, no test failed, and missing noise was detected."""
        claims_sound = all(claim.sound for claim in (*self.training_loop, *self.devices))
        return claims_sound and all(test.sound for test in self.noise_tests)

    @property
    def shortfalls(self) -> dict[str, float]:
        """Minimum shortfall of noise, by level, that any situation detects with probability `POWER`."""
        levels = dict.fromkeys(test.level for test in self.noise_tests if test.numbers)
        return {level: min(test.shortfall for test in self.noise_tests if test.level == level) for level in levels}


def claim_line(title: str, claim: ClaimResult) -> str:
    """Format the result of one claim as a line."""
    finding, outcome = claim.finding, "refuted" if claim.finding.refuted else "not refuted"
    bounds = f"ε ≥ {short(finding.bound)}; {short(finding.f_dp)} by f-DP, {short(finding.one_run)} by (ε, δ)"
    guesses = f"{finding.guesses.correct} of {finding.guesses.made} guesses right"
    return f"{'ok  ' if claim.sound else 'FAIL'}  {title}, {claim.name}: {outcome}; {bounds}; {guesses}"


def noise_test_lines(result: NoiseTestResult) -> list[str]:
    """Format one situation as a line, followed by a line for each failed test."""
    power = f"smallest p {result.least.p_value:.2g}; detects noise short by {result.shortfall:.1%}"
    tested = f"{result.numbers} noise values, {len(result.checks)} tests, {power}"
    words = tested if result.numbers else result.least.shown
    failed = [f"        {check.name}: {check.shown} (p ≤ {check.p_value:.1g})" for check in result.failed]
    return [f"{'ok  ' if result.sound else 'FAIL'}  per {result.level}, {result.name}: {words}", *failed]


def summary_line(results: AuditResults, false_alarms: float) -> str:
    """Summarize the audit, with the smallest shortfall of noise that it detects."""
    outcome = "no claim is refuted" if results.sound else "a claim is refuted, or missing noise was not detected"
    shortfalls = [f"{shortfall:.1%} per {level}" for level, shortfall in results.shortfalls.items()]
    power = f"; noise short by {' or by '.join(shortfalls)} is detected with probability {POWER}" if shortfalls else ""
    return f"{'ok  ' if results.sound else 'FAIL'}  {outcome}; false alarms: {false_alarms:g} of all audits{power}"


def group_lines(group: RunGroup) -> list[str]:
    """Format the attacks on one group of runs, a line for each attack."""
    lines = [f"{group.name}: {group.writers} writers, {len(group.runs)} run{'s' if len(group.runs) != 1 else ''}"]
    for name, result in group.attacks.items():
        auc, tpr = result.auc, result.tpr
        lines.append(
            f"  {name:24} AUC {auc.value:.3f} [{auc.low:.3f}, {auc.high:.3f}]  "
            f"TPR at {FPR:.0%} FPR {tpr.value:.3f} [{tpr.low:.3f}, {tpr.high:.3f}]"
        )
    return lines
