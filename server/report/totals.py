"""What the rounds of a run came to, as `summary.json` and the page have it: alike for real devices and simulated."""

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
    """Bytes, energy and ε of all rounds, and this process' memory."""
    trained = [record.train for record in history if record.train]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "bytes": {"up": sum(t.bytes_up for t in trained), "down": sum(t.bytes_down for t in trained)},
        "joules": {"value": sum(t.joules for t in trained), "quality": "estimate"},
        "epsilon": _most(history, IMAGE),
        "device_epsilon": _most(history, DEVICE),
        "peak_rss_mib": peak / (2**20 if sys.platform == "darwin" else 2**10),
    }


def validation_losses(state: RunState) -> dict[str, float]:
    """Mean validation loss of the base and of the best shared adapter on the same devices, where these told any."""
    validation = state.history[state.best_round].validation
    found = {"base": validation.base, "shared": validation.shared}
    return {arm: loss for arm, loss in found.items() if loss is not None} if validation.shared is not None else {}


def rows(history: Sequence[Round], *, secret: bool = False) -> list[dict[str, Any]]:
    """Of each round, what the page draws of it.

    Args:
        secret: leave out what would tell how many devices were asked in it.
    """
    base = _base(history)
    found = [
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
        for row in found:
            row |= dict.fromkeys(("bytes_up", "bytes_down"), 0) | dict.fromkeys(("seconds", "joules"), 0.0)
    return found


def device_row(name: str, profile: str, facts: DeviceMetrics, loss: dict[str, float]) -> DeviceRow:
    """What one device did over all rounds."""
    told = dataclasses.asdict(facts)
    for remembered in ("events", "asked", "last", "loss"):  # what the server remembers: no cost of anything
        del told[remembered]
    return DeviceRow(name=name, profile=profile, loss=loss, **told)


def _base(history: Sequence[Round]) -> float | None:
    return next((record.validation.base for record in history if record.validation.base is not None), None)


def _most(history: Sequence[Round], unit: str) -> dict[str, Any] | None:
    found = [guarantee for record in history for guarantee in record.guarantees if guarantee.unit == unit]
    return dataclasses.asdict(max(found, key=lambda guarantee: guarantee.value)) if found else None
