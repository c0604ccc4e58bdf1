"""Report of an audit: `audit.json`, and `audit.html`, a page without external resources."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from markupsafe import Markup

from common import atomic_files
from conf.schemas.audit import AuditConfig
from privacy.audit.membership import AttackTrial, MembershipResult, RocCurve, matched_weights
from server.report.page import environment
from simulations.audit import plots
from simulations.audit.membership import ATTACKS, CONTROL, RELATIVE, RunGroup
from simulations.audit.plots import Curve
from simulations.audit.verdicts import POWER, AuditResults, ClaimResult, NoiseTestResult

TONES = ("personal", "local", "shared", "ink")  # of groups of runs, repeated cyclically
_MAX_POINTS = 400  # of a curve on the page


def write(results: AuditResults, config: AuditConfig, folder: Path, command: str) -> Path:
    """Write `audit.json` and `audit.html`.

    Args:
        results: results of the audit.
        config: its configuration.
        folder: output folder.
        command: command that repeats the audit.

    Returns:
        Path of `audit.html`.
    """
    atomic_files.write(folder / "audit.json", json.dumps(as_json(results, config, command), indent=1).encode())
    page = folder / "audit.html"
    unfinished = page.with_name(page.name + ".part")
    unfinished.write_text(render(results, config, command), encoding="utf-8")
    return unfinished.replace(page)


def as_json(results: AuditResults, config: AuditConfig, command: str) -> dict[str, Any]:
    """Return the contents of `audit.json`.

    Args:
        results: results of the audit.
        config: its configuration.
        command: command that repeats the audit.
    """
    return {
        "command": command,
        "sound": results.sound,
        "training_loop": [_claim_json(claim) for claim in results.training_loop],
        "whole_devices": [_claim_json(claim) for claim in results.devices],
        "noise": [_noise_test_json(test) for test in results.noise_tests],
        "sees_noise_short_by": {"power": POWER, **results.shortfalls},
        "membership": [
            {
                "arm": group.name,
                "runs": [str(run.folder) for run in group.runs],
                "writers": group.writers,
                "attacks": {name: _attack_json(result) for name, result in group.attacks.items()},
            }
            for group in results.run_groups
        ],
        "config": dataclasses.asdict(config),
    }


def render(results: AuditResults, config: AuditConfig, command: str) -> str:
    """Return the page as HTML.

    Args:
        results: results of the audit.
        config: its configuration.
        command: command that repeats the audit.
    """
    tones, groups = _tones(len(results.run_groups)), results.run_groups
    return (
        environment(Path(__file__).parent)
        .get_template("page.html")
        .render(
            results=results,
            power=POWER,
            config=config,
            command=command,
            config_yaml=yaml.safe_dump(dataclasses.asdict(config), sort_keys=False),
            bounds={"training_loop": bounds(results.training_loop), "devices": bounds(results.devices)},
            attacks=[*map(RELATIVE.format, ATTACKS.values()), *ATTACKS.values(), CONTROL],
            control=CONTROL,
            curves=[(name, roc_curves(groups, name)) for name in map(RELATIVE.format, ATTACKS.values())],
            intervals=[(group, auc_intervals(group, tone)) for group, tone in zip(groups, tones, strict=True)],
            histograms=[(group, score_histograms(group.trials[RELATIVE.format("loss")])) for group in groups],
            tones=tones,
        )
    )


def bounds(claims: Sequence[ClaimResult]) -> Markup:
    """Plot the lower bounds of ε over the claimed values."""
    honest = [claim for claim in claims if claim.honest]
    if not honest:
        return Markup("")
    claimed = [claim.finding.claimed.value for claim in honest]
    lines = [
        Curve("claimed", [0.0, *claimed], [0.0, *claimed], "base", dashed=True),
        Curve("at least", claimed, [claim.finding.bound for claim in honest], "shared", dots=True),
        Curve("at least, by f-DP", claimed, [claim.finding.f_dp for claim in honest], "personal", dots=True),
        Curve("at least, by (ε, δ)", claimed, [claim.finding.one_run for claim in honest], "local", dots=True),
    ]
    if estimates := [claim.estimate for claim in honest if claim.estimate is not None]:
        lines.append(Curve("estimate from cosines", claimed, estimates, "ink", dots=True))
    return plots.curves(lines, x_label="claimed ε", y_label="lower bound of ε")


def roc_curves(groups: Sequence[RunGroup], attack: str) -> Markup:
    """Plot the ROC curve of one attack on every group of runs."""
    chance = np.geomspace(plots.MIN_RATE, 1, 20).tolist()
    lines = [Curve("chance", chance, chance, "base", dashed=True)]
    for group, tone in zip(groups, _tones(len(groups)), strict=True):
        roc = thin(group.attacks[attack].roc)
        lines.append(Curve(_short_guarantee(group.name), roc.fpr.tolist(), roc.tpr.tolist(), tone))
    return plots.rate_curves(lines, x_label="false positives", y_label="true positives")


def auc_intervals(group: RunGroup, tone: str) -> Markup:
    """Plot the AUC of every attack on one group of runs."""
    rows = [(name, result.auc, "base" if name == CONTROL else tone) for name, result in group.attacks.items()]
    ends = [end for _, interval, _ in rows for end in (interval.low, interval.high)]
    return plots.intervals(rows, chance=0.5, low=min(0.4, *ends), high=max(0.6, *ends))


def score_histograms(trial: AttackTrial) -> Markup:
    """Plot the scores of members and of non-members that show the same letters."""
    weights = matched_weights(np.ones(len(trial.scores)), trial.members, trial.letters)
    inside = trial.members & (weights > 0)
    outside = ~trial.members
    return plots.histograms(trial.scores[inside], trial.scores[outside], weights[outside], x_label="score")


def thin(roc: RocCurve) -> RocCurve:
    """Reduce a curve to the points that a plot can show, including all points of its steep start."""
    count = len(roc.fpr)
    if count <= _MAX_POINTS:
        return roc
    steep, spaced = np.arange(_MAX_POINTS // 4), np.linspace(0, count - 1, _MAX_POINTS).astype(int)
    points = np.unique(np.concatenate([steep, spaced]))
    return RocCurve(roc.fpr[points], roc.tpr[points])


def _claim_json(claim: ClaimResult) -> dict[str, Any]:
    return {
        "name": claim.name,
        "honest": claim.honest,
        "refuted": claim.finding.refuted,
        "sound": claim.sound,
        "estimate": claim.estimate,
        **dataclasses.asdict(claim.finding),
        "guesses": claim.finding.guesses._asdict(),
    }


def _noise_test_json(test: NoiseTestResult) -> dict[str, Any]:
    return {
        "name": test.name,
        "per": test.level,
        "numbers": test.numbers,
        "sound": test.sound,
        "significance": test.significance,
        "sees_noise_short_by": test.shortfall,
        "checks": [check._asdict() for check in test.checks],
    }


def _attack_json(result: MembershipResult) -> dict[str, Any]:
    curve = thin(result.roc)
    return {
        "auc": result.auc._asdict(),
        "tpr_at_1_percent_fpr": result.tpr._asdict(),
        "members": result.members,
        "others": result.others,
        "roc": {"fpr": curve.fpr.tolist(), "tpr": curve.tpr.tolist()},
    }


def _tones(count: int) -> list[str]:
    return [TONES[index % len(TONES)] for index in range(count)]


def _short_guarantee(name: str) -> str:
    """Shorten a guarantee by its neighboring relation and δ, which are in parentheses."""
    return re.sub(r" \(.*?\)", "", name)
