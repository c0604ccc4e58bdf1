"""Full plans: every device trains every site."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from protocol.messages import DeviceReport, TrainingPlan
from strategies.planning import DevicePlanner, SentAdapter, SitesAndSteps, planning
from strategies.planning.plan import affordable_steps, seconds_per_step, transfer_seconds


@planning("full")
class FullPlanning:
    """Train every site for as many steps as the limits allow, and for at least one."""

    every_site = True

    def in_round(self, sent: SentAdapter) -> DevicePlanner:
        return partial(self.plan, sent=sent)

    def plan(self, report: DeviceReport, full: TrainingPlan, sent: SentAdapter) -> SitesAndSteps:
        """Compute the plan of one device.

        Args:
            report: report of the device.
            full: its largest plan.
            sent: adapter and limits of the round.
        """
        steps = affordable_steps(
            report,
            full,
            sent.limits,
            transfer_seconds=transfer_seconds(report, full, sites=sent.sites, download=sent.download),
            seconds_per_step=seconds_per_step(report, full),
        )
        return SitesAndSteps(replace(full, steps=max(1, min(full.steps, steps))), work=1.0)
