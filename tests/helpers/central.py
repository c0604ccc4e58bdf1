"""A strategy with privacy per device over the fake fleet, without the time that it takes to solve for σ."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from privacy.central import Gaussian
from privacy.noise import Simulated
from privacy.storage import Files
from server.ledger import Ledger
from strategies.aggregation.fedit import FedIT
from strategies.central_dp import Budget, DeviceLevel
from strategies.selection.poisson import Poisson
from strategies.strategy import Federated
from tests.helpers.fleet import PLAN, SITES, strategy

Z, CLIP, EXPECTED = 1.5, 0.2, 4.0
BUDGET = Budget(epsilon=1000.0, delta=1e-3, participations=3)


def simulated(purpose: str, round: int) -> Simulated:
    return Simulated(seed=5, client="server", round=round, purpose=purpose)


def device_level(folder: Path, **changes: Any) -> DeviceLevel:
    settings: dict[str, Any] = {
        "run": PLAN.run,
        "sites": SITES,
        "mechanism": Gaussian(noise_multiplier=Z, expected=EXPECTED),
        "sampling_rate": 1.0,
        "clip": CLIP,
        "budget": BUDGET,
        "noise": partial(simulated, "updates"),
        "ledger": Ledger(Files(folder)),
    }
    return DeviceLevel(**settings | changes)


def private(folder: Path, *, level: dict[str, Any] | None = None, **changes: Any) -> Federated:
    """FedIT behind clip and noise."""
    settings = {"aggregation": FedIT(), "accept_simulated": True} | changes
    return strategy(device_level=device_level(folder, **level or {}), **settings)


def poisson(rate: float) -> Poisson:
    return Poisson(rate=rate, coins=partial(simulated, "selection"))
