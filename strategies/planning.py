"""What one device is asked to do: the full plan, cut down to its link and its speed."""

from __future__ import annotations

from dataclasses import dataclass, replace

from protocol.messages import DeviceReport, TrainingPlan

_BITS = 8 / 1e6  # megabits in a byte


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What plans are cut to."""

    metered_rank: int | None = None
    """Directions asked of a device on a metered link; None: as many as of the others."""
    deadline: float | None = None
    """Seconds that a round may take a device, its transfers included; None: no limit."""


def plan_for(
    report: DeviceReport, full: TrainingPlan, limits: Limits, *, download: int, upload_per_rank: int
) -> TrainingPlan:
    """The plan for one device: never more than `full`, and at least one step.

    Args:
        download: bytes of the adapter sent.
        upload_per_rank: bytes of one direction of the adapter that comes back.
    """
    rank = full.rank
    if report.metered and limits.metered_rank is not None:
        rank = min(rank, limits.metered_rank)
    if limits.deadline is None:
        return replace(full, rank=rank)
    transfers = download * _BITS / report.downlink_mbps + rank * upload_per_rank * _BITS / report.uplink_mbps
    affordable = int((limits.deadline - transfers) / seconds_per_step(report, full))
    return replace(full, rank=rank, steps=max(1, min(full.steps, affordable)))


def seconds_per_step(report: DeviceReport, plan: TrainingPlan) -> float:
    """Expected time of one step: under DP a picture is drawn several times."""
    draws = plan.privacy.draws if plan.privacy else 1
    return plan.batch_size * draws / report.examples_per_second
