"""What an audit found: lines for the terminal, `audit.json`, and `audit.html`, one page that stands on its own."""

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
from simulations.audit.membership import AGAINST, ATTACKS, CONTROL, RunGroup
from simulations.audit.plots import Curve
from simulations.audit.verdicts import POWER, AuditResults, ClaimResult, NoiseTestResult

TONES = ("personal", "local", "shared", "ink")  # of arms, in turn
_POINTS = 400  # of a curve on the page


def write(results: AuditResults, config: AuditConfig, folder: Path, command: str) -> Path:
    """Write `audit.json` and `audit.html`; the page."""
    atomic_files.write(folder / "audit.json", json.dumps(as_json(results, config, command), indent=1).encode())
    page = folder / "audit.html"
    unfinished = page.with_name(page.name + ".part")
    unfinished.write_text(render(results, config, command), encoding="utf-8")
    return unfinished.replace(page)


def as_json(results: AuditResults, config: AuditConfig, command: str) -> dict[str, Any]:
    """All numbers of the page."""
    return {
        "command": command,
        "sound": results.sound,
        "training_loop": [_verdict(verdict) for verdict in results.loop],
        "whole_devices": [_verdict(verdict) for verdict in results.clients],
        "noise": [_fit(fit) for fit in results.fits],
        "sees_noise_short_by": {"power": POWER, **results.shortfalls},
        "membership": [
            {
                "arm": arm.name,
                "runs": [str(run.folder) for run in arm.runs],
                "writers": arm.writers,
                "attacks": {name: _membership(found) for name, found in arm.found.items()},
            }
            for arm in results.arms
        ],
        "config": dataclasses.asdict(config),
    }


def render(results: AuditResults, config: AuditConfig, command: str) -> str:
    """The whole page as HTML."""
    return (
        environment(Path(__file__).parent)
        .get_template("page.html")
        .render(
            results=results,
            power=POWER,
            config=config,
            command=command,
            config_yaml=yaml.safe_dump(dataclasses.asdict(config), sort_keys=False),
            bounds={"loop": bounds(results.loop), "clients": bounds(results.clients)},
            attacks=[*map(AGAINST.format, ATTACKS.values()), *ATTACKS.values(), CONTROL],
            control=CONTROL,
            curves=[(name, roc_curves(results.arms, name)) for name in map(AGAINST.format, ATTACKS.values())],
            intervals=[
                (arm, auc_intervals(arm, tone)) for arm, tone in zip(results.arms, _tones(results), strict=True)
            ],
            histograms=[(arm, score_histograms(arm.trials[AGAINST.format("loss")])) for arm in results.arms],
            tones=_tones(results),
        )
    )


def bounds(verdicts: Sequence[ClaimResult]) -> Markup:
    """What is claimed beside what is shown."""
    held = [verdict for verdict in verdicts if verdict.honest]
    if not held:
        return Markup("")
    claimed = [verdict.finding.claimed.value for verdict in held]
    found = [
        Curve("claimed", [0.0, *claimed], [0.0, *claimed], "base", dashed=True),
        Curve("at least", claimed, [verdict.finding.bound for verdict in held], "shared", dots=True),
        Curve("at least, by f-DP", claimed, [verdict.finding.f_dp for verdict in held], "personal", dots=True),
        Curve("at least, by (ε, δ)", claimed, [verdict.finding.one_run for verdict in held], "local", dots=True),
    ]
    if estimates := [verdict.estimate for verdict in held if verdict.estimate is not None]:
        found.append(Curve("estimate from cosines", claimed, estimates, "ink", dots=True))
    return plots.curves(found, x_label="ε that is claimed", y_label="ε that is shown")


def roc_curves(arms: Sequence[RunGroup], attack: str) -> Markup:
    """One attack on every arm."""
    chance = np.geomspace(plots.LEAST, 1, 20).tolist()
    found = [Curve("chance", chance, chance, "base", dashed=True)]
    for arm, tone in zip(arms, _cycle(len(arms)), strict=True):
        curve = thinned(arm.found[attack].roc)
        found.append(Curve(_short(arm.name), curve.fpr.tolist(), curve.tpr.tolist(), tone))
    return plots.rates(found, x_label="false positives", y_label="true positives")


def auc_intervals(arm: RunGroup, tone: str) -> Markup:
    """The AUC of every attack on one arm."""
    rows = [(name, found.auc, "base" if name == CONTROL else tone) for name, found in arm.found.items()]
    ends = [end for _, interval, _ in rows for end in (interval.low, interval.high)]
    return plots.intervals(rows, chance=0.5, low=min(0.4, *ends), high=max(0.6, *ends))


def score_histograms(trial: AttackTrial) -> Markup:
    """Scores of members and of others that show the same letters."""
    weights = matched_weights(np.ones(len(trial.scores)), trial.members, trial.letters)
    inside = trial.members & (weights > 0)
    others = ~trial.members
    return plots.histograms(trial.scores[inside], trial.scores[others], weights[others], x_label="score")


def thinned(roc: RocCurve) -> RocCurve:
    """As many points as a plot can show, among them the steep ones at the beginning."""
    count = len(roc.fpr)
    if count <= _POINTS:
        return roc
    places = np.unique(np.concatenate([np.arange(_POINTS // 4), np.linspace(0, count - 1, _POINTS).astype(int)]))
    return RocCurve(roc.fpr[places], roc.tpr[places])


def _verdict(verdict: ClaimResult) -> dict[str, Any]:
    return {
        "name": verdict.name,
        "honest": verdict.honest,
        "refuted": verdict.finding.refuted,
        "sound": verdict.sound,
        "estimate": verdict.estimate,
        **dataclasses.asdict(verdict.finding),
        "guesses": verdict.finding.guesses._asdict(),
    }


def _fit(fit: NoiseTestResult) -> dict[str, Any]:
    return {
        "name": fit.name,
        "per": fit.level,
        "numbers": fit.numbers,
        "sound": fit.sound,
        "significance": fit.significance,
        "sees_noise_short_by": fit.shortfall,
        "checks": [check._asdict() for check in fit.checks],
    }


def _membership(found: MembershipResult) -> dict[str, Any]:
    curve = thinned(found.roc)
    return {
        "auc": found.auc._asdict(),
        "tpr_at_1_percent_fpr": found.tpr._asdict(),
        "members": found.members,
        "others": found.others,
        "roc": {"fpr": curve.fpr.tolist(), "tpr": curve.tpr.tolist()},
    }


def _tones(results: AuditResults) -> list[str]:
    return _cycle(len(results.arms))


def _cycle(count: int) -> list[str]:
    return [TONES[place % len(TONES)] for place in range(count)]


def _short(name: str) -> str:
    """A promise without what it is relative to."""
    return re.sub(r" \(.*?\)", "", name)
