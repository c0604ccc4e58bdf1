"""A plan for each device that can be asked, and what it should cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from models.lora.adapter import Adapter, Sites
from protocol.messages import DeviceReport, TrainingPlan
from strategies.planning.knapsack import SiteSet
from strategies.planning.plan import PlanLimits, affordable_steps, restricted_plan, seconds_per_step, transfer_seconds
from strategies.planning.site_selection import SiteSelector, fitted


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
        mixed_ranks: whether a device may train a lower rank than the full plan's; if not, who can't is left out.
        fitting: chooses the sites that a device trains at; None: all of them, in one step at least.
    """

    sites: Sites
    limits: PlanLimits
    mixed_ranks: bool = True
    fitting: SiteSelector | None = None

    def plans(
        self, reports: Iterable[DeviceReport], full: TrainingPlan, *, adapter: Adapter, download: int
    ) -> dict[str, Planned]:
        """Of each device by its name, but for those that can do nothing of this; never more than `full`.

        Devices that tell the same of themselves have one plan, which is made once.

        Args:
            adapter: that is sent, in so many bytes.
        """
        choices: dict[tuple[str, ...] | None, list[SiteSet]] = {}
        known: dict[DeviceReport, Planned | None] = {}
        plans = {}
        for report in reports:
            kind = replace(report, device="")
            if kind not in known:
                known[kind] = self._plan(kind, full, adapter, choices, download)
            if (planned := known[kind]) is not None:
                plans[report.device] = planned
        return plans

    def _plan(
        self,
        report: DeviceReport,
        full: TrainingPlan,
        adapter: Adapter,
        choices: dict[tuple[str, ...] | None, list[SiteSet]],
        download: int,
    ) -> Planned | None:
        """Args:
        choices: of the devices that train at these sites; those that are missing are put in.
        """
        most = restricted_plan(report, full, self.limits, sites=self.sites, mixed_ranks=self.mixed_ranks)
        if most is None:
            return None
        if self.fitting is None:
            return self.whole(report, most, download=download)
        if most.sites not in choices:
            choices[most.sites] = self.fitting.choices(adapter, most.sites)
        best = fitted(report, most, self.limits, self.fitting, choices[most.sites], sites=self.sites, download=download)
        return None if best is None else self._planned(report, *best, download)

    def whole(self, report: DeviceReport, most: TrainingPlan, *, download: int) -> Planned:
        """At every site that there is and at least one step, whether or not the device can do it."""
        sent = transfer_seconds(report, most, sites=self.sites, download=download)
        steps = affordable_steps(report, self.limits, transfer_seconds=sent, step=seconds_per_step(report, most))
        return self._planned(report, replace(most, steps=max(1, min(most.steps, steps))), 1.0, download)

    def _planned(self, report: DeviceReport, plan: TrainingPlan, work: float, download: int) -> Planned:
        """What a plan should cost whose steps take this share of those at every site."""
        training = plan.steps * seconds_per_step(report, plan) * work
        sent = transfer_seconds(report, plan, sites=self.sites, download=download)
        return Planned(plan=plan, seconds=sent + training, joules=training * report.watts)
