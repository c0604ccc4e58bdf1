"""Limits and site selector of a configuration's plans."""

from __future__ import annotations

from conf.schemas.federation import FederationConfig
from models.base.base import Base
from strategies.aggregation import Aggregation
from strategies.planning.plan import PlanLimits
from strategies.planning.site_selection import SiteSelector, base_pass_costs


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


def build_site_selector(config: FederationConfig, base: Base | None, memory_factor: float) -> SiteSelector | None:
    """Build the site selector of planning.name=device; None if devices train all sites.

    Args:
        config: configuration of the run.
        base: its base.
        memory_factor: factor on the predicted memory of a pass.
    """
    if config.planning.name == "full":
        return None
    if base is None:
        raise ValueError("base: required by planning.name=device")
    return SiteSelector(costs=base_pass_costs(base, config.adapter.shared.rank), memory_factor=memory_factor)
