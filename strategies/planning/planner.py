"""Planner: a plan for each device, with its predicted cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from models.lora.adapter import Adapter, Sites
from protocol.messages import DeviceReport, TrainingPlan
from strategies.planning import PlanningMethod, SentAdapter, SitesAndSteps
from strategies.planning.full import FullPlanning
from strategies.planning.plan import PlanLimits, restricted_plan, seconds_per_step, transfer_seconds
from training.round_work import steps_per_round


@dataclass(frozen=True, kw_only=True)
class Planning:
    """How the plan of a device without limits becomes the plan of each device."""

    limits: PlanLimits = field(default_factory=PlanLimits)
    method: PlanningMethod = field(default_factory=FullPlanning)
    """Chooses the sites and steps of each device."""
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
        method: chooses the sites and steps of each device.
    """

    sites: Sites
    limits: PlanLimits
    mixed_ranks: bool = True
    method: PlanningMethod = field(default_factory=FullPlanning)

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
        sent = self._sent(adapter, download)
        planner = self.method.in_round(sent)
        by_report: dict[DeviceReport, PlannedDevice | None] = {}
        plans = {}
        for report in reports:
            anonymous = replace(report, device="")
            if anonymous not in by_report:
                largest = restricted_plan(anonymous, full, self.limits, sites=self.sites, mixed_ranks=self.mixed_ranks)
                best = None if largest is None else planner(anonymous, largest)
                by_report[anonymous] = None if best is None else _with_cost(anonymous, best, sent)
            if (planned := by_report[anonymous]) is not None:
                plans[report.device] = planned
        return plans

    def at_every_site(
        self, report: DeviceReport, full: TrainingPlan, *, adapter: Adapter, download: int
    ) -> PlannedDevice:
        """Compute a plan with every site of `full` and at least one step, even if it is not feasible for the device.

        Args:
            report: report of the device.
            full: plan with all sites.
            adapter: adapter that is sent.
            download: bytes of the encoded adapter.
        """
        sent = self._sent(adapter, download)
        return _with_cost(report, FullPlanning().plan(report, full, sent), sent)

    def _sent(self, adapter: Adapter, download: int) -> SentAdapter:
        return SentAdapter(adapter=adapter, sites=self.sites, download=download, limits=self.limits)


def _with_cost(report: DeviceReport, chosen: SitesAndSteps, sent: SentAdapter) -> PlannedDevice:
    """Predict the cost of a plan."""
    plan, work = chosen
    training = steps_per_round(plan) * seconds_per_step(report, plan) * work
    transfers = transfer_seconds(report, plan, sites=sent.sites, download=sent.download)
    return PlannedDevice(plan=plan, seconds=transfers + training, joules=training * report.watts)
