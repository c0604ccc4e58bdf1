"""Plan of one device: the full plan, reduced to its link, speed and power."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from math import prod

from common.units import HOUR, MEGABITS
from models.lora.adapter import Sites
from models.lora.trainable import trained_shapes
from protocol.messages import DeviceReport, TrainingPlan
from protocol.quantization import bytes_per_number
from training.public_schedule import scheduled_examples
from training.round_work import method_steps

SLOW_UPLINK_MBPS = 2.0
PRECISIONS = ("fp32", "fp16", "int8", "int4")  # of updates, in descending order of bits
_UNLIMITED_STEPS = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class PlanLimits:
    """Limits that plans are reduced to."""

    metered_rank: int | None = None
    """Largest rank of a device on a metered link; None: no limit."""
    metered_update: str | None = None
    """Precision of updates from devices on a metered or slow link, if the full plan has more bits; None: that of the
    full plan."""
    feedback: bool = False
    """Whether devices that use `metered_update` add the quantization residual to their next update."""
    deadline: float | None = None
    """Maximum seconds of a round on one device, including transfers; None: no limit."""
    joules: float | None = None
    """Maximum energy of a round's training on one device; None: no limit."""
    battery_share: float | None = None
    """Largest fraction of the remaining battery charge for a device that isn't charging; None: no limit."""

    @property
    def uses_transient_state(self) -> bool:
        """Whether the limits depend on state that may have changed since a device reported it."""
        return self.battery_share is not None


@dataclass(frozen=True, kw_only=True)
class CosineDecay:
    """Learning rate that decreases to zero over the rounds (Loshchilov & Hutter, 2017, arXiv:1608.03983, eq. 5).

    Towards the end of training, the accumulated noise decays, and little noise is added.
    """

    rounds: int

    def __call__(self, rate: float, round: int) -> float:
        """Return the learning rate of a round; round 1 has the full rate."""
        return rate * 0.5 * (1 + math.cos(math.pi * (round - 1) / self.rounds))


def restricted_plan(
    report: DeviceReport, full: TrainingPlan, limits: PlanLimits, *, sites: Sites, mixed_ranks: bool
) -> TrainingPlan | None:
    """Reduce the full plan to the rank and sites that a device trains, and to its link.

    Args:
        report: report of the device.
        full: plan of a device without limits.
        limits: limits of the run.
        sites: sites of the adapter.
        mixed_ranks: whether a rank may be lower than that of the full plan.

    Returns:
        The plan; None if the device can train no site, or if the plan would have to be reduced and can't be.
    """
    ranks = [full.rank, *([] if report.rank is None else [report.rank])]
    if report.metered and limits.metered_rank is not None:
        ranks.append(limits.metered_rank)
    only = None if report.sites is None else tuple(name for name in sites if name in set(report.sites))
    if (min(ranks) < full.rank and not mixed_ranks) or (only is not None and not only):
        return None
    reduced = replace(full, rank=min(ranks), sites=None if only is None or len(only) == len(sites) else only)
    if full.scaffold and reduced != full:
        return None  # a control variate covers everything that was sent
    low_precision = limits.metered_update
    slow = report.metered or report.uplink_mbps < SLOW_UPLINK_MBPS
    if low_precision is None or not slow or PRECISIONS.index(low_precision) <= PRECISIONS.index(full.update):
        return reduced
    return replace(reduced, update=low_precision, feedback=limits.feedback)


def affordable_steps(
    report: DeviceReport, full: TrainingPlan, limits: PlanLimits, *, transfer_seconds: float, seconds_per_step: float
) -> int:
    """Compute the number of steps on the shared adapter within the limits, 0 or more.

    Args:
        report: report of the device.
        full: its largest plan, whose method of personalization takes steps too.
        limits: limits of the run.
        transfer_seconds: seconds of the device's transfers.
        seconds_per_step: seconds of one step.
    """
    bounds: list[float] = [_UNLIMITED_STEPS]
    if limits.deadline is not None:
        bounds.append((limits.deadline - transfer_seconds) / seconds_per_step)
    if (joules := energy_budget(report, limits)) is not None:
        bounds.append(joules / (seconds_per_step * report.watts))
    return max(0, int(min(bounds)) - method_steps(full))


def energy_budget(report: DeviceReport, limits: PlanLimits) -> float | None:
    """Compute the joules that a round may use on a device; None: no limit, also if its battery is unknown."""
    budgets = [] if limits.joules is None else [limits.joules]
    fraction, level, full = limits.battery_share, report.battery, report.battery_wh
    if fraction is not None and level is not None and full is not None and not report.charging:
        budgets.append(fraction * level * full * HOUR)
    return min(budgets, default=None)


def transfer_seconds(report: DeviceReport, plan: TrainingPlan, *, sites: Sites, download: int) -> float:
    """Compute the seconds of downloading the adapter and uploading the update.

    Args:
        report: report of the device.
        plan: its plan.
        sites: sites of the adapter.
        download: bytes of the adapter.
    """
    return download * MEGABITS / report.downlink_mbps + upload_bytes(plan, sites) * MEGABITS / report.uplink_mbps


def upload_bytes(plan: TrainingPlan, sites: Sites) -> float:
    """Compute the bytes of a plan's update, without the few bytes of tensor names."""
    trained = {name: site for name, site in sites.items() if plan.sites is None or name in plan.sites}
    numbers = sum(map(prod, trained_shapes(trained, plan.rank, plan.trains).values()))
    return numbers * (4.0 if plan.update == "fp32" else bytes_per_number(plan.update, plan.keep))


def seconds_per_step(report: DeviceReport, plan: TrainingPlan) -> float:
    """Compute the time of a step that trains every site; under DP, the average over the public duration of the plan."""
    return scheduled_examples(plan) / plan.steps / report.examples_per_second
