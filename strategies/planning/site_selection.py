"""Site selection: the sites and steps that fit a device's memory, time and power."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import ClassVar

from common.units import GIB
from models.base.base import Base
from models.families.known import find_base
from models.footprint.footprint import MARGIN, example_shapes
from models.footprint.site_costs import PassCosts, pass_costs
from models.lora.adapter import Adapter, Factors, Sites
from protocol.messages import DeviceReport, TrainingPlan
from strategies.planning import DevicePlanner, SentAdapter, SitesAndSteps, planning
from strategies.planning.knapsack import SiteSet, site_sets
from strategies.planning.plan import PlanLimits, affordable_steps, seconds_per_step, transfer_seconds

RUNTIME = 390 << 20
"""Bytes of a process before it loads a network, as in the profiles of conf/device."""
UNIFORM_FRACTION = 0.5
"""Fraction of the total gain that is distributed uniformly: a site without training so far has no product norm."""


@dataclass(frozen=True, kw_only=True)
class SiteSelector:
    """Costs of training at sites of the run's base.

    Args:
        costs: costs at a rank that no plan exceeds.
        memory_factor: factor of a pass's memory, for a base that stands for a larger one.
        runtime_bytes: bytes of a process before it loads a network.
        held_bytes: bytes that the method of personalization holds, whatever the sites (`training.personalization`).
    """

    costs: PassCosts
    memory_factor: float = 1.0
    runtime_bytes: int = RUNTIME
    held_bytes: int = 0
    every_site: ClassVar = False

    def in_round(self, sent: SentAdapter) -> DevicePlanner:
        """Return the planner of a round, which lists the sets of sites once for each set of trainable sites."""
        candidates = cache(partial(self.site_sets, sent.adapter))

        def plan(report: DeviceReport, full: TrainingPlan) -> SitesAndSteps | None:
            return best_plan(
                report, full, sent.limits, self, candidates(full.sites), sites=sent.sites, download=sent.download
            )

        return plan

    def site_sets(self, adapter: Adapter, trainable: Collection[str] | None = None) -> list[SiteSet]:
        """List the sets of sites for the plans of a round, by the gains of this adapter.

        Args:
            adapter: adapter that is sent.
            trainable: names of the sites that may be trained; None: all.
        """
        sites = tuple(site for site in self.costs.sites if trainable is None or site.name in trainable)
        return site_sets(PassCosts(sites=sites), site_gains(adapter))

    def fits(self, candidate: SiteSet, report: DeviceReport) -> bool:
        """Whether training at these sites fits the memory of a device."""
        network = self.memory_factor * (candidate.bytes + self.held_bytes)
        return MARGIN * (self.runtime_bytes + network) <= report.memory_gib * GIB


@planning("device")
class DevicePlanning(SiteSelector):
    """Train the most valuable sites that fit the memory, the time and the power of a device.

    Args:
        base: base of the run, whose costs are predicted.
        rank: rank that no plan exceeds.
        memory_factor, held_bytes: see `SiteSelector`.

    Raises:
        ValueError: there is no base.
    """

    def __init__(self, *, base: Base | None, rank: int, memory_factor: float = 1.0, held_bytes: int = 0) -> None:
        if base is None:
            raise ValueError("base: required by planning=device")
        super().__init__(costs=base_pass_costs(base, rank), memory_factor=memory_factor, held_bytes=held_bytes)


def site_gains(adapter: Adapter) -> dict[str, float]:
    """Estimate the gain of training at each site, with the sum 1: half uniform, half by the norm of its product BA.

    The adapter is what every device was sent, which is public or released with noise.
    """
    norms = {name: product_norm(factors) for name, factors in adapter.items()}
    total, uniform = sum(norms.values()), 1 / len(norms)
    if total == 0:
        return dict.fromkeys(norms, uniform)
    return {name: UNIFORM_FRACTION * uniform + (1 - UNIFORM_FRACTION) * norm / total for name, norm in norms.items()}


def product_norm(factors: Factors) -> float:
    """Compute ‖BA‖ = √tr((BᵀB)(AAᵀ)) without the product."""
    a, b = (factor.double() for factor in factors)
    return math.sqrt(max(0.0, float(((b.T @ b) * (a @ a.T)).sum())))


def base_pass_costs(base: Base, rank: int) -> PassCosts:
    """Compute the costs of a loaded base at its training resolution."""
    return pass_costs(base, *example_shapes(find_base(str(base.folder)), base.resolution), rank=rank)


def best_plan(
    report: DeviceReport,
    full: TrainingPlan,
    limits: PlanLimits,
    selector: SiteSelector,
    candidates: Sequence[SiteSet],
    *,
    sites: Sites,
    download: int,
) -> SitesAndSteps | None:
    """Find the feasible plan with the largest total gain of its steps.

    Ties are broken by gain per step, then by less work, then by less memory.

    Args:
        report: report of the device.
        full: plan of a device without limits.
        limits: limits of the run.
        selector: costs of sites.
        candidates: sets of sites to select from.
        sites: sites of the adapter.
        download: bytes of the adapter.

    Returns:
        The plan; None if not even one step is feasible.
    """
    step = seconds_per_step(report, full)
    transfers = partial(transfer_seconds, report, sites=sites)
    up = {name: transfers(replace(full, sites=(name,)), download=0) for name in sites}  # once for thousands of sets
    down = transfers(replace(full, sites=()), download=download)
    best: tuple[tuple[float, ...], SiteSet, int] | None = None
    for candidate in candidates:
        if (best and candidate.gain * full.steps < best[0][0]) or not selector.fits(candidate, report):
            continue
        seconds = down + sum(up[name] for name in candidate.sites)
        steps = min(
            full.steps,
            affordable_steps(report, full, limits, transfer_seconds=seconds, seconds_per_step=step * candidate.work),
        )
        value = (candidate.gain * steps, candidate.gain, -candidate.work, -float(candidate.bytes))
        if steps and (best is None or value > best[0]):
            best = value, candidate, steps
    if best is None:
        return None
    _, selected, steps = best
    names = selected.sites if len(selected.sites) < len(sites) else None
    return SitesAndSteps(replace(full, sites=names, steps=steps), selected.work)
