"""Canary clients: devices whose updates are known, in rounds of the server's own `CentralDP`.

Each canary client moves a different single number of B, by far more than the clip. So all updates are orthogonal, and a
round's release along each is that client's part of the sum, plus noise.

References:
    Andrew et al. (2023), arXiv:2302.03098.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.lora.adapter import Adapter, Factors
from privacy.accounting import PoissonGaussian
from privacy.audit import goodness_of_fit as fit
from privacy.audit.goodness_of_fit import Check
from privacy.bounded_sum import RESOLUTION
from privacy.central import AdaptiveClip, GaussianMechanism
from privacy.noise import NoiseSource
from privacy.storage import FileStorage
from server.ledger import ServerLedger
from simulations.audit.canaries import LENGTH, draw_included, network, site
from strategies.aggregation.fedit import FedIT
from strategies.aggregation.ffa import FFA
from strategies.central_dp import CentralDP, DeviceBudget

CLIP = 1.0
_ADAPTIVE_RATE = 0.2
_QUANTILE = 0.5


@dataclass(frozen=True, kw_only=True)
class CanaryCohort:
    """Canary clients [m]; the included ones participate in every round."""

    claim: PoissonGaussian
    included: np.ndarray
    side: int  # rows and columns of the matrix B; each client moves one of its numbers
    adaptive: bool = False  # whether the clip follows a quantile
    trains_both: bool = False  # FedIT, which noises A as well; else FFA

    @property
    def expected(self) -> float:
        return float(len(self.included)) / 2


class CanaryReleases(NamedTuple):
    """Releases of all rounds, in units of the clip."""

    sums: np.ndarray
    """Noised sums [rounds, D]; NaN where a sum is not observable."""
    known: np.ndarray
    """Exact sum [D], equal in every round, with B's part last."""
    noise_stddev: float
    """Standard deviation of the noise on each number of `sums`."""
    counts: np.ndarray
    """Residuals of the noised counts with an adaptive clip, standard normal [rounds]; else empty."""

    @property
    def residuals(self) -> np.ndarray:
        """Residuals [rounds, D], dithered within grid steps, since whole steps aren't normally distributed."""
        generator = np.random.default_rng(0)
        dither = (generator.random(self.sums.shape) - 0.5) / RESOLUTION
        residuals = (self.sums - self.known + dither) / self.noise_stddev
        return np.where(np.isnan(residuals), generator.standard_normal(residuals.shape), residuals)


def run_rounds(cohort: CanaryCohort, noise: Callable[[int], NoiseSource]) -> CanaryReleases:
    """Run all rounds of the claim with the included clients; `noise`: round -> source of its noise."""
    z, side = cohort.claim.noise_multiplier, cohort.side
    present = np.nonzero(cohort.included)[0]
    count_stddev = cohort.expected / 20 + z  # σ_b: any value for which z_Δ exists
    adaptive = (
        AdaptiveClip(quantile=_QUANTILE, rate=_ADAPTIVE_RATE, noise_stddev=count_stddev) if cohort.adaptive else None
    )
    mechanism = GaussianMechanism(noise_multiplier=z, expected=cohort.expected, adaptive=adaptive)
    rule = FedIT() if cohort.trains_both else FFA()
    sums, counts = [], []
    with tempfile.TemporaryDirectory() as folder:
        # The budget is larger than the cost, since only the noise is tested here.
        budget = DeviceBudget(epsilon=1e9, delta=1e-5, participations=cohort.claim.steps)
        level = CentralDP(
            run="audit",
            sites=network(side).sites,
            mechanism=mechanism,
            sampling_rate=1.0,
            clip=CLIP,
            budget=budget,
            noise=noise,
            ledger=ServerLedger(FileStorage(Path(folder))),
        )
        for number in range(cohort.claim.steps):
            level.charge_round(number, ["canaries"], b"the same")
            clip = level.clip
            updates = (_update(side, int(client), clip) for client in present)
            aggregated, facts = level.privatize(rule, _adapter(side, torch.zeros(side * side)), updates, round=number)
            sums.append(_difference(cohort, aggregated.adapter) * cohort.expected / clip)
            if adaptive:
                noised = _QUANTILE - np.log(facts.next_clip / clip) / adaptive.rate  # b̃
                exact = 0.5 - 0.5 * len(present) / cohort.expected  # every update is longer than the clip
                counts.append((noised - exact) * cohort.expected / adaptive.noise_stddev)
    ones = torch.zeros(side * side)
    ones[torch.from_numpy(present)] = 1.0
    known = np.nan_to_num(_difference(cohort, _adapter(side, ones)))
    noise_stddev = adaptive.noise_multiplier(z) if adaptive else z
    return CanaryReleases(np.stack(sums), known, noise_stddev, np.array(counts))


def checks(released: CanaryReleases) -> list[Check]:
    """Run all tests on the releases."""
    rounds = list(released.residuals)
    results = [check._replace(name=f"noise: {check.name}") for check in fit.battery(rounds)]
    present = [released.known / released.noise_stddev] * len(rounds)
    results.append(fit.alignment(rounds, present, "noise: along devices that took part"))
    absent = [(1 - released.known) / released.noise_stddev] * len(rounds)
    results.append(fit.alignment(rounds, absent, "noise: along devices that did not"))
    if len(released.counts):
        results += [
            check._replace(name=f"count: {check.name}")
            for check in (fit.distribution(released.counts), fit.variance(released.counts))
        ]
    return results


def _adapter(side: int, b: Tensor) -> Adapter:
    """Build an adapter with these numbers [side²] of B."""
    return {site(0): Factors(torch.eye(side), b.view(side, side))}


def _update(side: int, client: int, clip: float) -> Adapter:
    """Build the update of one canary client."""
    b = torch.zeros(side * side)
    b[client] = LENGTH * clip
    return _adapter(side, b)


def _difference(cohort: CanaryCohort, adapter: Adapter) -> np.ndarray:
    """Return an adapter's difference from the start [D], in the order in which noise is drawn.

    Entries where A is one are NaN, since float32 rounding hides small changes there.
    """
    a, b = (factor.double().numpy() for factor in adapter[site(0)])
    if not cohort.trains_both:
        return np.ravel(b)
    return np.concatenate([np.where(np.eye(cohort.side) == 0, a, np.nan).ravel(), b.ravel()])


def cohorts(longest: int, seed: int) -> list[tuple[str, CanaryCohort]]:
    """List the cohorts of every audit besides the claims; their releases have about `longest` numbers in total."""
    rounds, side = 20, max(4, math.isqrt(longest // 20))
    claim = PoissonGaussian(noise_multiplier=2.0, sampling_rate=1.0, steps=rounds)
    included = draw_included(min(100, (side // 4) ** 2), seed)
    none_included = np.zeros_like(included)
    plain = CanaryCohort(claim=claim, included=included, side=side)
    return [
        ("FedIT, 20 rounds", replace(plain, trains_both=True)),
        ("FFA, 20 rounds with an adaptive clip", replace(plain, adaptive=True)),
        ("FFA, 20 rounds that no device answered", replace(plain, included=none_included, side=max(1, side // 4))),
    ]
