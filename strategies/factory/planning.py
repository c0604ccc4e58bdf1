"""Limits and method of a configuration's plans."""

from __future__ import annotations

from typing import cast

from conf.schemas.federation import FederationConfig
from models.base.base import Base
from strategies.aggregation import Aggregation
from strategies.planning import PLANNINGS, PlanningMethod
from strategies.planning.plan import PlanLimits


def plan_limits(config: FederationConfig, rule: Aggregation) -> PlanLimits:
    """Return the limits of `planning` and of `compression`.

    Args:
        config: configuration of the run.
        rule: its aggregation.
    """
    # A control variate covers every direction, and device-level privacy protects the link of a device.
    reducible = rule.mixed_ranks and config.drift_correction == "none" and not config.privacy.of_devices
    return PlanLimits(
        metered_rank=config.planning.metered_rank if reducible else None,
        metered_update=config.compression.metered_upload,
        feedback=rule.stable_factors,
        deadline=config.planning.deadline,
        joules=config.planning.max_joules,
        battery_share=config.planning.max_battery_fraction,
    )


def build_planning(config: FederationConfig, base: Base | None, memory_factor: float) -> PlanningMethod:
    """Build the method of `planning.name`.

    Args:
        config: configuration of the run.
        base: its base.
        memory_factor: factor on the predicted memory of a pass.
    """
    known = {"base": base, "rank": config.adapter.shared.rank, "memory_factor": memory_factor}
    return cast(PlanningMethod, PLANNINGS.create(config.planning.name, known))
