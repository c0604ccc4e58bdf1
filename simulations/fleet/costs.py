"""Memory and time of training plans on simulated devices: footprint of one pass, scaled by the fleet's workload."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, lru_cache, partial
from types import MappingProxyType

from client.planning.plan_search import pass_seconds
from common.units import GIB, MIB
from conf.schemas.fleet import WorkloadConfig
from conf.schemas.planning import DeviceProfileConfig
from conf.schemas.training import BaseConfig
from models.base.base import Base
from models.diffusion.sites import exact_pattern
from models.families.known import find_base
from models.footprint.footprint import Footprint, example_shapes, footprint, meta_denoiser
from models.footprint.site_costs import PassCosts
from models.lora.adapter import Sites
from protocol.messages import TrainingPlan
from strategies.planning.site_selection import base_pass_costs
from training.personalization import held_bytes
from training.round_work import examples_per_round, method_of

PredictFootprint = Callable[[int], Footprint]
"""Rank -> footprint of a pass over one picture with an adapter of this rank at every site."""


class Costs:
    """Memory and time of training plans.

    Args:
        predict: footprints of the fleet's base.
        pass_costs: costs of passes that train some of the sites; called once, for the first such plan.
        workload: factors by which memory and arithmetic are multiplied.
        sites: sites of the adapter; only methods of personalization that hold more than it need them.
    """

    def __init__(
        self,
        predict: PredictFootprint,
        pass_costs: Callable[[], PassCosts],
        workload: WorkloadConfig,
        sites: Sites = MappingProxyType({}),
    ) -> None:
        self._predict, self._pass_costs, self._workload = predict, cache(pass_costs), workload
        self._sites = sites

    def required_bytes(self, plan: TrainingPlan) -> float:
        """Return the peak bytes of a pass, excluding the process' own memory."""
        method, factor = method_of(plan), self._workload.memory_factor
        held = factor * held_bytes(method, self._sites, plan.rank)
        if plan.sites is None:
            return held + self._footprint(method.largest_rank(plan.rank)).peak_bytes
        return held + factor * self._pass_costs().bytes(plan.sites)

    def fits(self, plan: TrainingPlan, device: DeviceProfileConfig) -> bool:
        """Return whether a pass of the plan and the process fit in the device's memory."""
        return self.required_bytes(plan) + device.runtime_mib * MIB <= device.memory_gib * GIB

    def seconds(self, plan: TrainingPlan, device: DeviceProfileConfig) -> float:
        """Return the seconds of all steps of a plan at full speed."""
        work = 1.0 if plan.sites is None else self._pass_costs().work(plan.sites)
        return examples_per_round(plan) * work * self.example_seconds(method_of(plan).trained_rank(plan.rank), device)

    def example_seconds(self, rank: int, device: DeviceProfileConfig) -> float:
        """Return the seconds of one training example at every site at full speed."""
        return pass_seconds(self._footprint(rank), device)

    def _footprint(self, rank: int) -> Footprint:
        return scale_footprint(self._predict(rank), self._workload)


def scale_footprint(footprint: Footprint, workload: WorkloadConfig) -> Footprint:
    """Scale the footprint of a pass to a base that is larger by the workload's factors."""
    memory = {
        name: value for name, value in vars(footprint).items() if name.endswith("_bytes") and name != "moved_bytes"
    }
    work = ("matrix_operations", "convolution_operations", "moved_bytes")
    return replace(
        footprint,
        **{name: round(workload.memory_factor * value) for name, value in memory.items() if name != "runtime_bytes"},
        **{name: round(workload.compute_factor * getattr(footprint, name)) for name in work},
    )


def build_costs(base: Base, settings: BaseConfig, workload: WorkloadConfig, *, rank: int) -> Costs:
    """Build the costs of a run's base on its fleet.

    Args:
        base: the loaded base.
        settings: how it was loaded.
        workload: factors by which memory and arithmetic are multiplied.
        rank: rank of the shared adapter.
    """
    key = (
        str(base.folder),
        exact_pattern(base.sites),
        settings.weights,
        settings.gradient_checkpointing,
        base.resolution,
    )
    pass_costs = partial(base_pass_costs, base, rank)
    return Costs(lambda rank: _predict_footprint(*key, rank), pass_costs, workload, base.sites)


@lru_cache(maxsize=64)
def _predict_footprint(
    base: str, sites: str, weights: str, checkpointing: str, resolution: int, rank: int
) -> Footprint:
    """Predict the footprint of a pass, in a second or two."""
    spec = find_base(base)
    denoiser = meta_denoiser(spec, sites=sites, weights=weights, checkpointing=checkpointing)
    return footprint(denoiser, *example_shapes(spec, resolution), rank=rank)
