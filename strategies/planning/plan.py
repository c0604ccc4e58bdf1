"""What one device is asked to do: the full plan, cut down to its link, its speed and its power."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from math import prod

from common.units import HOUR, MEGABITS
from models.lora.adapter import Sites
from models.lora.trainable import trained_shapes
from protocol.messages import DeviceReport, TrainingPlan
from protocol.quantization import bytes_per_number
from training.public_duration import scheduled_examples

SLOW = 2.0  # Mbit/s up
PRECISIONS = ("fp32", "fp16", "int8", "int4")  # of updates, from most bits to fewest
_MANY = 2**31 - 1  # steps, where nothing limits them


@dataclass(frozen=True, kw_only=True)
class PlanLimits:
    """What plans are cut to."""

    metered_rank: int | None = None
    """Directions asked of a device on a metered link; None: as many as of the others."""
    metered_update: str | None = None
    """Precision in which devices on a metered or slow link send their change, if the full plan has more bits; None:
    as the others do."""
    feedback: bool = False
    """Whether those then carry what rounding left into the next round."""
    deadline: float | None = None
    """Seconds that a round may take a device, its transfers included; None: no limit."""
    joules: float | None = None
    """That a round's training may take of a device; None: no limit."""
    battery_share: float | None = None
    """Of what is left in its battery, that this may take of a device which doesn't charge; None: no limit."""

    @property
    def uses_transient_state(self) -> bool:
        """Whether they go by what may have changed since a device told of it."""
        return self.battery_share is not None


@dataclass(frozen=True, kw_only=True)
class CosineDecay:
    """A learning rate that falls to zero over the rounds (Loshchilov & Hutter, 2017, arXiv:1608.03983, eq. 5).

    Noise that training has gathered is forgotten towards its end, and little new comes in.
    """

    rounds: int

    def __call__(self, rate: float, round: int) -> float:
        """The rate of a round from 1 on, of which the first has the whole."""
        return rate * 0.5 * (1 + math.cos(math.pi * (round - 1) / self.rounds))


def restricted_plan(
    report: DeviceReport, full: TrainingPlan, limits: PlanLimits, *, sites: Sites, mixed_ranks: bool
) -> TrainingPlan | None:
    """The full plan, in the rank and at the sites that the device trains and that its link carries; None: none such,
    or less than a plan that can't be cut.

    Args:
        mixed_ranks: whether a rank may be lower than the full plan's.
    """
    most = [full.rank, *([] if report.rank is None else [report.rank])]
    if report.metered and limits.metered_rank is not None:
        most.append(limits.metered_rank)
    only = None if report.sites is None else tuple(name for name in sites if name in set(report.sites))
    if (min(most) < full.rank and not mixed_ranks) or (only is not None and not only):
        return None
    cut = replace(full, rank=min(most), sites=None if only is None or len(only) == len(sites) else only)
    if full.scaffold and cut != full:
        return None  # a control variate is of all that was sent
    few = limits.metered_update
    light = report.metered or report.uplink_mbps < SLOW
    if few is None or not light or PRECISIONS.index(few) <= PRECISIONS.index(full.update):
        return cut
    return replace(cut, update=few, feedback=limits.feedback)


def affordable_steps(report: DeviceReport, limits: PlanLimits, *, transfer_seconds: float, step: float) -> int:
    """Whole steps that the limits leave a device, whose transfers and whose steps take so many seconds; 0 or more."""
    most: list[float] = [_MANY]
    if limits.deadline is not None:
        most.append((limits.deadline - transfer_seconds) / step)
    if (joules := allowance(report, limits)) is not None:
        most.append(joules / (step * report.watts))
    return max(0, int(min(most)))


def allowance(report: DeviceReport, limits: PlanLimits) -> float | None:
    """Joules that a round may take of a device; None: no limit, as of one whose battery nobody knows."""
    found = [] if limits.joules is None else [limits.joules]
    share, level, full = limits.battery_share, report.battery, report.battery_wh
    if share is not None and level is not None and full is not None and not report.charging:
        found.append(share * level * full * HOUR)
    return min(found, default=None)


def transfer_seconds(report: DeviceReport, plan: TrainingPlan, *, sites: Sites, download: int) -> float:
    """Seconds in which `download` bytes of the adapter come down, and what was trained goes up."""
    return download * MEGABITS / report.downlink_mbps + upload_bytes(plan, sites) * MEGABITS / report.uplink_mbps


def upload_bytes(plan: TrainingPlan, sites: Sites) -> float:
    """Bytes of what comes back of a plan, without a few for names."""
    trained = {name: site for name, site in sites.items() if plan.sites is None or name in plan.sites}
    numbers = sum(map(prod, trained_shapes(trained, plan.rank, plan.trains).values()))
    return numbers * (4.0 if plan.update == "fp32" else bytes_per_number(plan.update, plan.keep))


def seconds_per_step(report: DeviceReport, plan: TrainingPlan) -> float:
    """Time of one step at every site; under DP its share of the time that all take, whatever is drawn."""
    return scheduled_examples(plan) / plan.steps / report.examples_per_second
