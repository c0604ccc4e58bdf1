"""Candidates with default values for everything that a test does not set."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from strategies.round.metrics import zero_metrics
from strategies.selection import DeviceCandidate, DeviceCandidates
from tests.helpers.fleet import PLAN, REPORT


def candidate(
    name: str = "a",
    *,
    asked: int = 0,
    last: int = 0,
    loss: float | None = None,
    seconds: float = 1.0,
    joules: float = 1.0,
    steps: int = 1,
    **report: Any,
) -> DeviceCandidate:
    return DeviceCandidate(
        report=replace(REPORT, device=name, **report),
        plan=replace(PLAN, steps=steps, batch_size=1),
        seconds=seconds,
        joules=joules,
        metrics=zero_metrics(asked=asked, last=last, loss=loss) if asked else None,
    )


def candidates(*, round: int = 1, **settings: dict[str, Any]) -> DeviceCandidates:
    return DeviceCandidates({name: candidate(name, **metrics) for name, metrics in settings.items()}, round=round)


def asked_in(
    devices: DeviceCandidates, names: list[str], round: int, losses: dict[str, float] | None = None
) -> DeviceCandidates:
    """Return the candidates after a round in which these were asked."""
    after = dict(devices)
    for name in names:
        metrics = zero_metrics(asked=1, last=round, loss=(losses or {}).get(name))
        before = after[name].metrics
        after[name] = replace(after[name], metrics=before.merge(metrics) if before else metrics)
    return DeviceCandidates(after, devices.losses, round=round + 1)
