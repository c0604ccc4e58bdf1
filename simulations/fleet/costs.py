"""What a plan takes of a simulated device: the footprint of one pass, times the fleet's workload."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache, lru_cache, partial

from client.planning.plan_search import pass_seconds
from common.units import GIB, MIB
from conf.schemas.planning import DeviceProfileConfig
from conf.schemas.simulation import SimulationConfig, WorkloadConfig
from models.base.base import Base
from models.families.known import find_base
from models.footprint.footprint import Footprint, example_shapes, footprint, meta_denoiser
from models.footprint.site_costs import PassCosts
from protocol.messages import TrainingPlan
from strategies.planning.site_selection import base_pass_costs
from training.public_duration import scheduled_examples

Predict = Callable[[int], Footprint]
"""Of a pass of one picture, whose adapter has this rank and is trained at every site."""


class Costs:
    """Memory and time of plans.

    Args:
        predict: footprints of the fleet's base.
        partly: what passes cost that train at some sites; called once, when the first such plan comes.
        workload: what they are multiplied by.
    """

    def __init__(self, predict: Predict, partly: Callable[[], PassCosts], workload: WorkloadConfig) -> None:
        self._predict, self._partly, self._workload = predict, cache(partly), workload

    def needed(self, plan: TrainingPlan) -> float:
        """Bytes of a pass at the moment when it holds most, beside what the process takes by itself."""
        if plan.sites is None:
            return self._footprint(plan.rank).peak_bytes
        return self._workload.memory * self._partly().bytes(plan.sites)

    def fits(self, plan: TrainingPlan, device: DeviceProfileConfig) -> bool:
        """Whether the device has them."""
        return self.needed(plan) + device.runtime_mib * MIB <= device.memory_gib * GIB

    def seconds(self, plan: TrainingPlan, device: DeviceProfileConfig) -> float:
        """Of all its steps, at full speed."""
        work = 1.0 if plan.sites is None else self._partly().work(plan.sites)
        return scheduled_examples(plan) * work * self.example_seconds(plan.rank, device)

    def example_seconds(self, rank: int, device: DeviceProfileConfig) -> float:
        """Of one training example at every site, at full speed."""
        return pass_seconds(self._footprint(rank), device)

    def _footprint(self, rank: int) -> Footprint:
        return scaled(self._predict(rank), self._workload)


def scaled(found: Footprint, workload: WorkloadConfig) -> Footprint:
    """The same pass of a base that is so many times as large."""
    memory = {name: value for name, value in vars(found).items() if name.endswith("_bytes") and name != "moved_bytes"}
    work = ("matrix_operations", "convolution_operations", "moved_bytes")
    return replace(
        found,
        **{name: round(workload.memory * value) for name, value in memory.items() if name != "runtime_bytes"},
        **{name: round(workload.arithmetic * getattr(found, name)) for name in work},
    )


def costs(config: SimulationConfig, base: Base) -> Costs:
    """Of the base of a run, on its fleet."""
    sites = "|".join(re.escape(site) for site in base.sites)
    key = (str(base.folder), sites, config.base.weights, config.base.checkpointing, base.resolution)
    partly = partial(base_pass_costs, base, config.adapter.shared.rank)
    return Costs(lambda rank: _predicted(*key, rank), partly, config.fleet.workload)


@lru_cache(maxsize=64)
def _predicted(base: str, sites: str, weights: str, checkpointing: str, resolution: int, rank: int) -> Footprint:
    """A second or two of work."""
    known = find_base(base)
    held = meta_denoiser(known, sites=sites, weights=weights, checkpointing=checkpointing)
    return footprint(held, *example_shapes(known, resolution), rank=rank)
