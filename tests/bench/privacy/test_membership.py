"""Tests of the membership table on attacks with known outcome."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from bench.privacy import membership
from conf.schemas.audit import AuditConfig
from privacy.audit.membership import AttackTrial, judge
from simulations.audit.membership import RunGroup

WRITERS, LETTERS = 30, 20


def arm(advantage: float) -> RunGroup:
    """Create a group whose members score higher by `advantage` standard deviations."""
    draw = np.random.default_rng(0)
    member = draw.random(WRITERS * LETTERS) < 0.5
    writer, letter = np.divmod(np.arange(WRITERS * LETTERS), LETTERS)
    trial = AttackTrial(draw.normal(size=len(member)) + advantage * member, member, writer, letter)
    membership_result = judge(trial, resamples=200, confidence=0.95, seed=0)
    return RunGroup("no differential privacy", [], WRITERS, {"loss": membership_result}, {"loss": trial})


def test_record_holds_auc_and_rates() -> None:
    recorded = membership.record({"open": arm(0.0), "overfitted": arm(2.0)})
    unknown, known = (recorded[name]["attacks"]["loss"] for name in ("open", "overfitted"))
    assert unknown["members"] + unknown["others"] == WRITERS * LETTERS
    assert unknown["auc"]["low"] < 0.5 < unknown["auc"]["high"]
    assert known["auc"]["value"] == pytest.approx(0.921, abs=0.03)  # Φ(2 / √2)
    assert known["tpr_at_1_percent_fpr"]["value"] > 0.2
    output = io.StringIO()
    Console(file=output, width=160).print(membership.table(recorded))
    assert "overfitted" in output.getvalue()
    assert f"{known['auc']['value']:.3f} [" in output.getvalue()


def test_all_arms_are_attacked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: dict[Path, Sequence[str]] = {}
    configs: list[AuditConfig] = []

    def run_groups(config: AuditConfig) -> list[RunGroup]:
        configs.append(config)
        return [arm(0.0)]

    monkeypatch.setattr(membership, "run", lambda command, folder: ran.update({folder: command}))
    monkeypatch.setattr(membership, "run_groups", run_groups)
    monkeypatch.setattr(membership, "write", lambda *_: None)
    out = tmp_path / "membership.json"
    monkeypatch.setattr(sys, "argv", ["membership", "--seeds", "0", "1", "--runs", str(tmp_path), "--out", str(out)])
    membership.main()
    assert [(len(config.runs), config.membership.adapter) for config in configs] == [
        (2, "best"),
        (2, "best"),
        (2, "best"),
        (1, "last"),
    ]
    assert {run for config in configs for run in config.runs} == set(map(str, ran))
    roles = {
        folder.name: [word for word in command if word.startswith("data.role=")] for folder, command in ran.items()
    }
    assert roles.pop("overfitted") == ["data.role=development"]
    assert all(role == ["data.role=test"] for role in roles.values())
    assert list(json.loads(out.read_text())["arms"]) == ["open", "example-8", "reference", "overfitted"]
