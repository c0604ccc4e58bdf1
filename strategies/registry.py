"""Registries of the components on each axis of a strategy.

Each component declares the influence of one device on it (`sensitivity`). `strategies.validation` uses only these
declarations: a new component is refused under privacy until it has one, and then appears in docs/privacy.md with its
reason. Secure aggregation, and noise that is correlated over rounds, would be two more axes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from common.plugins import Registry
from strategies.aggregation import AGGREGATIONS
from strategies.robust import ROBUST_RULES
from strategies.selection import SELECTIONS
from strategies.server_optimizers import OPTIMIZERS as OPTIMIZERS
from strategies.server_optimizers import PostProcessing


class TimingDeclaration(NamedTuple):
    """Sensitivity declaration of a round mode."""

    prechargeable: bool
    """Whether the participants of a round are known, and charged for, before any device is contacted."""
    reason: str


class BuiltIn(NamedTuple):
    """Component that the round loop implements itself."""

    sensitivity: TimingDeclaration | PostProcessing
    overlapping: bool = False
    """Whether a device may still train for an earlier round when a round begins."""


SYNC, ASYNC = "sync", "async"
TIMINGS: Registry[Any] = Registry("timing", key="round_loop", modules=__name__)
TIMINGS.update(
    {
        SYNC: BuiltIn(TimingDeclaration(prechargeable=True, reason="a round ends before the next begins")),
        ASYNC: BuiltIn(
            TimingDeclaration(
                prechargeable=False,
                reason="the devices of a round, and their numbers of updates, are known only after its last update",
            ),
            overlapping=True,
        ),
    }
)

AXES: Mapping[str, Registry[Any]] = {
    "aggregation": AGGREGATIONS,
    "robust": ROBUST_RULES,
    "selection": SELECTIONS,
    "timing": TIMINGS,
}
"""Axes of the table in docs/privacy.md."""
