"""What one device is asked to do: the full plan, cut down to its link and its speed."""

from __future__ import annotations

import math
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


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """A learning rate that falls to zero over the rounds (Loshchilov & Hutter, 2017, arXiv:1608.03983, eq. 5).

    Noise that training has gathered is forgotten towards its end, and little new comes in.
    """

    rounds: int

    def __call__(self, rate: float, round: int) -> float:
        """The rate of a round from 1 on, of which the first has the whole."""
        return rate * 0.5 * (1 + math.cos(math.pi * (round - 1) / self.rounds))


def plan_for(
    report: DeviceReport, full: TrainingPlan, limits: Limits, *, download: int, upload_per_rank: float
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
