"""Plans that fit a device: the sites that it trains at, and how many steps, by its memory, its time and its power."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial

from common.units import GIB
from models.base.base import Base
from models.families.known import find_base
from models.footprint.footprint import MARGIN, example_shapes
from models.footprint.site_costs import PassCosts, pass_costs
from models.lora.adapter import Adapter, Factors, Sites
from protocol.messages import DeviceReport, TrainingPlan
from strategies.planning.knapsack import SiteSet, choices
from strategies.planning.plan import PlanLimits, affordable_steps, seconds_per_step, transfer_seconds

RUNTIME = 390 << 20
"""Bytes of a process before there is a network, as profiles of conf/device have them."""
EVEN = 0.5
"""Share of all gain that is dealt evenly: a site that nobody has trained yet has no product to go by."""


@dataclass(frozen=True, kw_only=True)
class SiteSelector:
    """What it costs to train at sites of the run's base.

    Args:
        costs: with a rank that no plan exceeds.
        memory: how many times its memory a pass takes, of a base that stands for a larger one.
        runtime_bytes: of a process before there is a network.
    """

    costs: PassCosts
    memory: float = 1.0
    runtime_bytes: int = RUNTIME

    def choices(self, adapter: Adapter, among: Collection[str] | None = None) -> list[SiteSet]:
        """The sets of sites that a round's plans are made of, by what this adapter gains at each.

        Args:
            among: sites that may be trained; None: all.
        """
        sites = tuple(site for site in self.costs.sites if among is None or site.name in among)
        return choices(PassCosts(sites=sites), gains(adapter))

    def fits(self, choice: SiteSet, report: DeviceReport) -> bool:
        """Whether a device can hold what training at these sites takes."""
        return MARGIN * (self.runtime_bytes + self.memory * choice.bytes) <= report.memory_gib * GIB


def gains(adapter: Adapter) -> dict[str, float]:
    """What training at each site is worth, as a share of all: half of it even, half by the norm of its product BA.

    The adapter is what every device was sent: public, or released with noise.
    """
    norms = {name: product_norm(factors) for name, factors in adapter.items()}
    total, even = sum(norms.values()), 1 / len(norms)
    if total == 0:
        return dict.fromkeys(norms, even)
    return {name: EVEN * even + (1 - EVEN) * norm / total for name, norm in norms.items()}


def product_norm(factors: Factors) -> float:
    """‖BA‖ = √tr((BᵀB)(AAᵀ)), without the product."""
    a, b = (factor.double() for factor in factors)
    return math.sqrt(max(0.0, float(((b.T @ b) * (a @ a.T)).sum())))


def base_pass_costs(base: Base, rank: int) -> PassCosts:
    """Of a base that is there, at the resolution that it trains in."""
    return pass_costs(base, *example_shapes(find_base(str(base.folder)), base.resolution), rank=rank)


def fitted(
    report: DeviceReport,
    full: TrainingPlan,
    limits: PlanLimits,
    fitting: SiteSelector,
    found: Sequence[SiteSet],
    *,
    sites: Sites,
    download: int,
) -> tuple[TrainingPlan, float] | None:
    """The plan of most gain in all its steps that the device and the limits can hold; None: not even one step.

    Of two alike it is the one with more gain a step, then the shorter and the smaller. With it, how long its steps
    take, as a share of those at every site.
    """
    step = seconds_per_step(report, full)
    sent = partial(transfer_seconds, report, sites=sites)
    up = {name: sent(replace(full, sites=(name,)), download=0) for name in sites}  # of thousands of sets: once
    down = sent(replace(full, sites=()), download=download)
    best: tuple[tuple[float, ...], SiteSet, int] | None = None
    for choice in found:
        if (best and choice.gain * full.steps < best[0][0]) or not fitting.fits(choice, report):
            continue
        seconds = down + sum(up[name] for name in choice.sites)
        steps = min(full.steps, affordable_steps(report, limits, transfer_seconds=seconds, step=step * choice.work))
        worth = (choice.gain * steps, choice.gain, -choice.work, -float(choice.bytes))
        if steps and (best is None or worth > best[0]):
            best = worth, choice, steps
    if best is None:
        return None
    _, choice, steps = best
    chosen = choice.sites if len(choice.sites) < len(sites) else None
    return replace(full, sites=chosen, steps=steps), choice.work
