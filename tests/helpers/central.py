"""Strategies with device-level privacy for the fake fleet, without the time to solve for σ."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from privacy.central import GaussianMechanism
from privacy.noise import SimulatedNoise
from privacy.storage import FileStorage
from server.ledger import ServerLedger
from strategies.aggregation.fedit import FedIT
from strategies.central_dp import CentralDP, DeviceBudget
from strategies.flower_strategy import FlowerStrategy
from strategies.selection.poisson import Poisson
from tests.helpers.fleet import PLAN, SITES, strategy

Z, CLIP, EXPECTED = 1.5, 0.2, 4.0
BUDGET = DeviceBudget(epsilon=1000.0, delta=1e-3, participations=3)


def simulated(purpose: str, round: int) -> SimulatedNoise:
    return SimulatedNoise(seed=5, client="server", round=round, purpose=purpose)


def central_dp(folder: Path, **changes: Any) -> CentralDP:
    settings: dict[str, Any] = {
        "run": PLAN.run,
        "sites": SITES,
        "mechanism": GaussianMechanism(noise_multiplier=Z, expected=EXPECTED),
        "sampling_rate": 1.0,
        "clip": CLIP,
        "budget": BUDGET,
        "noise": partial(simulated, "updates"),
        "ledger": ServerLedger(FileStorage(folder)),
    }
    return CentralDP(**settings | changes)


def private(folder: Path, *, level: dict[str, Any] | None = None, **changes: Any) -> FlowerStrategy:
    """Make a strategy with FedIT and central DP."""
    settings = {"aggregation": FedIT(), "accept_simulated": True} | changes
    return strategy(central_dp=central_dp(folder, **level or {}), **settings)


def poisson(rate: float) -> Poisson:
    return Poisson(rate=rate, rng=partial(simulated, "selection"))
