"""Totals of a run for `summary.json` and the page, for real and simulated devices."""

from __future__ import annotations

import dataclasses
import resource
import sys
from collections.abc import Sequence
from typing import Any

from privacy.accounting import DEVICE, IMAGE
from server.report.page import DeviceRow
from server.rounds.state import Round, RunState
from strategies.round.metrics import DeviceMetrics, device_epsilon


def run_totals(history: Sequence[Round]) -> dict[str, Any]:
    """Return bytes, energy and ε of all rounds, and the peak memory of this process."""
    trained = [record.train for record in history if record.train]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "bytes": {"up": sum(t.bytes_up for t in trained), "down": sum(t.bytes_down for t in trained)},
        "joules": {"value": sum(t.joules for t in trained), "quality": "estimate"},
        "epsilon": _largest_guarantee(history, IMAGE),
        "device_epsilon": _largest_guarantee(history, DEVICE),
        "peak_rss_mib": peak / (2**20 if sys.platform == "darwin" else 2**10),
    }


def validation_losses(state: RunState) -> dict[str, float]:
    """Return mean validation losses of the base and the best shared adapter on the same devices, if any."""
    validation = state.history[state.best_round].validation
    losses = {"base": validation.base, "shared": validation.shared}
    return {arm: loss for arm, loss in losses.items() if loss is not None} if validation.shared is not None else {}


def round_rows(history: Sequence[Round], *, secret: bool = False) -> list[dict[str, Any]]:
    """Return each round's values for the charts of the page.

    Args:
        history: all rounds.
        secret: omit values that would reveal how many devices were asked in a round.
    """
    base = _base(history)
    rows = [
        {
            "round": record.number,
            "base": record.validation.base if record.number else base,
            "shared": record.validation.shared if record.number else base,
            "gain": record.validation.gain,
            "gain_error": record.validation.gain_error,
            "bytes_up": record.train.bytes_up if record.train else 0,
            "bytes_down": record.train.bytes_down if record.train else 0,
            "seconds": record.train.seconds if record.train else 0.0,
            "joules": record.train.joules if record.train else 0.0,
            "epsilon": record.epsilon,
            "device_epsilon": device_epsilon(record.train),
            "dropped": record.train.dropped if record.train else {},
        }
        for record in history
    ]
    if secret:
        for row in rows:
            row |= dict.fromkeys(("bytes_up", "bytes_down"), 0) | dict.fromkeys(("seconds", "joules"), 0.0)
    return rows


def device_row(name: str, profile: str, metrics: DeviceMetrics, loss: dict[str, float]) -> DeviceRow:
    """Return one device's row of the page.

    Args:
        name: name of the device.
        profile: its profile, in a simulation; otherwise empty.
        metrics: its sums over all rounds.
        loss: its held-out test loss by arm.
    """
    values = dataclasses.asdict(metrics)
    for key in ("events", "asked", "last", "loss"):  # records of the server, not costs
        del values[key]
    return DeviceRow(name=name, profile=profile, loss=loss, **values)


def _base(history: Sequence[Round]) -> float | None:
    return next((record.validation.base for record in history if record.validation.base is not None), None)


def _largest_guarantee(history: Sequence[Round], unit: str) -> dict[str, Any] | None:
    guarantees = [guarantee for record in history for guarantee in record.guarantees if guarantee.unit == unit]
    return dataclasses.asdict(max(guarantees, key=lambda guarantee: guarantee.value)) if guarantees else None
