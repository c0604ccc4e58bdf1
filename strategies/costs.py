"""Seconds and joules that devices report, limited to plausible values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from flwr.serverapp import Grid

from models.lora.adapter import Sites
from protocol.messages import DeviceReport, Personalized, TrainingPlan, Update
from strategies.clock import Clock
from strategies.round.connected_devices import RegisteredGrid
from strategies.round.plausibility import cap_to_median, plausible_cost

R = TypeVar("R", Update, Personalized)


@dataclass(frozen=True, kw_only=True)
class ReportedCosts:
    """Limit the costs in the replies of a run."""

    sites: Sites
    clock: Clock

    def time(self, grid: Grid) -> float | None:
        """Return the current time if devices use the same clock as this server, otherwise None."""
        return self.clock.now() if isinstance(grid, RegisteredGrid) else None

    def plausible(self, report: DeviceReport, plan: TrainingPlan, reply: R, sent_at: float | None) -> R:
        """Limit a reply to the plausible cost of its plan.

        Args:
            report: report of the device.
            plan: its plan.
            reply: its reply.
            sent_at: time of the request; None if devices use another clock.
        """
        elapsed = None if sent_at is None else self.clock.now() - sent_at
        seconds, joules = plausible_cost(report, plan, (reply.seconds, reply.joules), sites=self.sites, elapsed=elapsed)
        return replace(reply, seconds=seconds, joules=joules)

    def capped(self, replies: Sequence[R]) -> list[R]:
        """Cap each cost at a multiple of the median over all replies (`plausibility.cap_to_median`)."""
        seconds = cap_to_median([reply.seconds for reply in replies])
        joules = cap_to_median([reply.joules for reply in replies])
        return [replace(reply, seconds=s, joules=j) for reply, s, j in zip(replies, seconds, joules, strict=True)]
