"""Planner: a plan for each device, with its predicted cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from models.lora.adapter import Adapter, Sites
from protocol.messages import DeviceReport, TrainingPlan
from strategies.planning.knapsack import SiteSet
from strategies.planning.plan import PlanLimits, affordable_steps, restricted_plan, seconds_per_step, transfer_seconds
from strategies.planning.site_selection import SiteSelector, best_plan


@dataclass(frozen=True, kw_only=True)
class Planning:
    """How the plan of a device without limits becomes the plan of each device."""

    limits: PlanLimits = field(default_factory=PlanLimits)
    site_selector: SiteSelector | None = None
    """Selects the sites that each device trains; None: all of them."""
    lr_schedule: Callable[[float, int], float] | None = None
    """Computes the learning rate of a round from the plan's rate and the round's number; None: constant."""


@dataclass(frozen=True, kw_only=True)
class PlannedDevice:
    """Plan of a device, and its predicted cost."""

    plan: TrainingPlan
    seconds: float
    """Predicted time, including transfers."""
    joules: float
    """Predicted energy of training."""


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Planner within the limits of a run.

    Args:
        sites: sites of the adapter.
        limits: limits of the run.
        mixed_ranks: whether a device may train a lower rank than that of the full plan. If not, a device that would
            have to is left out.
        site_selector: selects the sites that a device trains; None: all of them, for at least one step.
    """

    sites: Sites
    limits: PlanLimits
    mixed_ranks: bool = True
    site_selector: SiteSelector | None = None

    def plans(
        self, reports: Iterable[DeviceReport], full: TrainingPlan, *, adapter: Adapter, download: int
    ) -> dict[str, PlannedDevice]:
        """Compute a plan for each device, never larger than `full`; devices without a feasible plan are left out.

        Devices with equal reports share one plan, which is computed once.

        Args:
            reports: reports of the devices.
            full: plan of a device without limits.
            adapter: adapter that is sent.
            download: bytes of the encoded adapter.

        Returns:
            Plans by device name.
        """
        site_sets: dict[tuple[str, ...] | None, list[SiteSet]] = {}
        by_report: dict[DeviceReport, PlannedDevice | None] = {}
        plans = {}
        for report in reports:
            anonymous = replace(report, device="")
            if anonymous not in by_report:
                by_report[anonymous] = self._plan(anonymous, full, adapter, site_sets, download)
            if (planned := by_report[anonymous]) is not None:
                plans[report.device] = planned
        return plans

    def _plan(
        self,
        report: DeviceReport,
        full: TrainingPlan,
        adapter: Adapter,
        site_sets: dict[tuple[str, ...] | None, list[SiteSet]],
        download: int,
    ) -> PlannedDevice | None:
        """Compute the plan of one device; None if no plan is feasible.

        Args:
            report: report of the device, without its name.
            full: plan of a device without limits.
            adapter: adapter that is sent.
            site_sets: cache of site sets by the sites that a device can train; missing entries are added.
            download: bytes of the adapter.
        """
        restricted = restricted_plan(report, full, self.limits, sites=self.sites, mixed_ranks=self.mixed_ranks)
        if restricted is None:
            return None
        if self.site_selector is None:
            return self.at_every_site(report, restricted, download=download)
        if restricted.sites not in site_sets:
            site_sets[restricted.sites] = self.site_selector.site_sets(adapter, restricted.sites)
        best = best_plan(
            report,
            restricted,
            self.limits,
            self.site_selector,
            site_sets[restricted.sites],
            sites=self.sites,
            download=download,
        )
        return None if best is None else self._with_cost(report, *best, download)

    def at_every_site(self, report: DeviceReport, full: TrainingPlan, *, download: int) -> PlannedDevice:
        """Compute a plan with every site of `full` and at least one step, even if it is not feasible for the device.

        Args:
            report: report of the device.
            full: plan with all sites.
            download: bytes of the adapter that is sent.
        """
        transfers = transfer_seconds(report, full, sites=self.sites, download=download)
        steps = affordable_steps(
            report, self.limits, transfer_seconds=transfers, seconds_per_step=seconds_per_step(report, full)
        )
        return self._with_cost(report, replace(full, steps=max(1, min(full.steps, steps))), 1.0, download)

    def _with_cost(self, report: DeviceReport, plan: TrainingPlan, work: float, download: int) -> PlannedDevice:
        """Predict the cost of a plan.

        Args:
            report: report of the device.
            plan: its plan.
            work: time of a step, as a fraction of a step that trains every site.
            download: bytes of the adapter.
        """
        training = plan.steps * seconds_per_step(report, plan) * work
        transfers = transfer_seconds(report, plan, sites=self.sites, download=download)
        return PlannedDevice(plan=plan, seconds=transfers + training, joules=training * report.watts)
