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
    """ε as estimated by canary clients."""

    @property
    def sound(self) -> bool:
        """Whether the result is the expected one."""
        return self.finding.refuted != self.honest


@dataclass(frozen=True)
class NoiseTestResult:
    """Results of the tests of one situation in which everything except the noise is known."""

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
        """The test of smallest p-value."""
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

    loop: list[ClaimResult] = field(default_factory=list)
    clients: list[ClaimResult] = field(default_factory=list)
    fits: list[NoiseTestResult] = field(default_factory=list)
    arms: list[RunGroup] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether no claim was refuted, no test failed, and missing noise was detected."""
        return all(verdict.sound for verdict in (*self.loop, *self.clients)) and all(fit.sound for fit in self.fits)

    @property
    def shortfalls(self) -> dict[str, float]:
        """Shortfall of noise, by level, that at least one situation detects with probability `POWER`."""
        levels = dict.fromkeys(fit.level for fit in self.fits if fit.numbers)
        return {level: min(fit.shortfall for fit in self.fits if fit.level == level) for level in levels}


def line(where: str, verdict: ClaimResult) -> str:
    """Format one verdict as a line."""
    found, held = verdict.finding, "refuted" if verdict.finding.refuted else "not refuted"
    bounds = f"ε ≥ {short(found.bound)}; {short(found.f_dp)} by f-DP, {short(found.one_run)} by (ε, δ)"
    right = f"{found.guesses.correct} of {found.guesses.made} guesses right"
    return f"{'ok  ' if verdict.sound else 'FAIL'}  {where}, {verdict.name}: {held}; {bounds}; {right}"


def fit_lines(fit: NoiseTestResult) -> list[str]:
    """Format one situation as a line, followed by a line for each failed test."""
    sees = f"least p {fit.least.p_value:.2g}; would see noise short by {fit.shortfall:.1%}"
    told = f"{fit.numbers} numbers of noise, {len(fit.checks)} tests, {sees}" if fit.numbers else fit.least.shown
    failed = [f"        {check.name}: {check.shown} (p ≤ {check.p_value:.1g})" for check in fit.failed]
    return [f"{'ok  ' if fit.sound else 'FAIL'}  per {fit.level}, {fit.name}: {told}", *failed]


def summary_line(results: AuditResults, false_alarms: float) -> str:
    """Summarize the audit, with the smallest deviation that it could have detected."""
    outcome = "nothing is refuted" if results.sound else "refuted, or blind"
    seen = [f"{shortfall:.1%} per {level}" for level, shortfall in results.shortfalls.items()]
    sees = f"; noise short by {' or by '.join(seen)} would be seen with probability {POWER}" if seen else ""
    return f"{'ok  ' if results.sound else 'FAIL'}  {outcome}; false alarms: {false_alarms:g} of all audits{sees}"


def arm_lines(arm: RunGroup) -> list[str]:
    """Format one arm as a line for each attack."""
    told = [f"{arm.name}: {arm.writers} writers, {len(arm.runs)} run{'s' if len(arm.runs) != 1 else ''}"]
    for name, found in arm.found.items():
        auc, tpr = found.auc, found.tpr
        told.append(
            f"  {name:24} AUC {auc.value:.3f} [{auc.low:.3f}, {auc.high:.3f}]  "
            f"TPR at {FPR:.0%} FPR {tpr.value:.3f} [{tpr.low:.3f}, {tpr.high:.3f}]"
        )
    return told
