"""A plan for each device that can be asked, and what it should cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from models.adapter import Adapter, Sites
from protocol.messages import DeviceReport, TrainingPlan
from strategies.fitting import Fitting, fitted
from strategies.knapsack import Choice
from strategies.planning import Limits, affordable, on_link, seconds_per_step, transfers


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What a device would be asked to do."""

    plan: TrainingPlan
    seconds: float
    """That it should take, with its transfers."""
    joules: float
    """That its training should take."""


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Plans within limits.

    Args:
        sites: of the adapter.
        fitting: chooses the sites that a device trains at; None: all of them, in one step at least.
    """

    sites: Sites
    limits: Limits
    fitting: Fitting | None = None

    def plans(
        self, reports: Iterable[DeviceReport], full: TrainingPlan, *, adapter: Adapter, download: int
    ) -> dict[str, Planned]:
        """Of each device by its name, but for those that can do nothing of this; never more than `full`.

        Devices that tell the same of themselves have one plan, which is made once.

        Args:
            adapter: that is sent, in so many bytes.
        """
        found = self.fitting.choices(adapter) if self.fitting else None
        known: dict[DeviceReport, Planned | None] = {}
        plans = {}
        for report in reports:
            kind = replace(report, device="")
            if kind not in known:
                known[kind] = self._plan(kind, full, found, download)
            if (planned := known[kind]) is not None:
                plans[report.device] = planned
        return plans

    def _plan(
        self, report: DeviceReport, full: TrainingPlan, found: list[Choice] | None, download: int
    ) -> Planned | None:
        if self.fitting is None or found is None:
            plan, work = self._whole(report, full, download), 1.0
        else:
            best = fitted(report, full, self.limits, self.fitting, found, sites=self.sites, download=download)
            if best is None:
                return None
            plan, work = best
        training = plan.steps * seconds_per_step(report, plan) * work
        sent = transfers(report, plan, sites=self.sites, download=download)
        return Planned(plan=plan, seconds=sent + training, joules=training * report.watts)

    def _whole(self, report: DeviceReport, full: TrainingPlan, download: int) -> TrainingPlan:
        """At every site, and at least one step."""
        plan = on_link(report, full, self.limits)
        sent = transfers(report, plan, sites=self.sites, download=download)
        steps = affordable(report, self.limits, transfers=sent, step=seconds_per_step(report, plan))
        return replace(plan, steps=max(1, min(full.steps, steps)))
