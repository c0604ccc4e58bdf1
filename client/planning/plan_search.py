"""The ladder: every way in which a device could train a base, from the best down, and which of them it can.

A rung is a quality (resolution first, then the sites that are trained, then the bits of the base), and whether it does
without checkpoints, which cost time alone. It is run in micro-batches of the fastest size that fits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

from common.units import GIB, HOUR, MIB
from conf.schemas.planning import DeviceProfileConfig, PlanConfig
from models.footprint.footprint import CHECKPOINTING_MODES, MARGIN, Footprint


@dataclass(frozen=True)
class TrainingSetting:
    """One way to train."""

    resolution: int  # side of a picture in pixels
    sites: str  # name of a set of sites
    weights: str  # one of `models.quantization.modes.MODES`
    checkpointing: str = CHECKPOINTING_MODES[-1]
    batch: int = 1  # pictures of a micro-batch


@dataclass(frozen=True)
class TrainingOption:
    """What a setting takes of a device, and what stands against it."""

    setting: TrainingSetting
    footprint: Footprint
    blocked: str | None = None
    steps: int = 0  # that there is time and battery for; 0, as are the others, without the memory
    seconds: float = 0.0  # of a step
    joules: float = 0.0  # of a step, the whole device

    def battery_share(self, device: DeviceProfileConfig) -> float | None:
        """Of a full battery, for all steps; None without one."""
        return None if device.battery_wh is None else self.steps * self.joules / HOUR / device.battery_wh


FootprintPredictor = Callable[[TrainingSetting], Footprint]


def settings(resolutions: Sequence[int], sites: Sequence[str], weights: Sequence[str]) -> list[TrainingSetting]:
    """All of them, from the top rung down, of lists from their best to their leanest."""
    return [TrainingSetting(*each) for each in product(resolutions, sites, weights, CHECKPOINTING_MODES)]


def search_plans(
    settings: Sequence[TrainingSetting], plan: PlanConfig, predict: FootprintPredictor
) -> tuple[list[TrainingOption], int | None]:
    """The rungs from the top to the best that fits and `plan.rungs` below it, and which one that is.

    None fits: all of them are blocked, and there is no best.
    """
    rungs: list[TrainingOption] = []
    best = None
    for setting in settings:
        if best is not None and len(rungs) > best + plan.alternatives:
            break
        rungs.append(fastest_option(setting, plan, predict))
        if best is None and rungs[-1].blocked is None:
            best = len(rungs) - 1
    return rungs, best


def fastest_option(setting: TrainingSetting, plan: PlanConfig, predict: FootprintPredictor) -> TrainingOption:
    """A setting in the fastest micro-batches of those that fit; if none does, in the smallest, with what blocks it."""
    found = rung(setting, plan, predict)
    if exceeds_memory(found.footprint, plan.device):
        return found
    for power in range(1, plan.batch_size.bit_length()):
        larger = rung(replace(setting, batch=2**power), plan, predict)
        if exceeds_memory(larger.footprint, plan.device):
            break
        found = min(found, larger, key=lambda rung: rung.seconds)
    return found


def rung(setting: TrainingSetting, plan: PlanConfig, predict: FootprintPredictor) -> TrainingOption:
    """One setting against one device."""
    footprint, device = predict(setting), plan.device
    if exceeds_memory(footprint, device):
        least = f"{MARGIN * footprint.peak_bytes / MIB:,.0f}"
        return TrainingOption(setting, footprint, f"memory: {least} of {device.memory_gib * GIB / MIB:,.0f}")
    seconds = -(-plan.batch_size // setting.batch) * pass_seconds(footprint, device)
    joules = seconds * device.watts_busy
    steps = {"time": plan.max_hours * HOUR / seconds}
    if device.battery_wh is not None:
        steps["battery"] = plan.max_battery_fraction * device.battery_wh * HOUR / joules
    scarce = min(steps, key=lambda name: steps[name])
    possible, blocked = min(plan.steps, int(steps[scarce])), None
    if possible < plan.min_steps:
        blocked = f"{scarce}: {possible} steps, of at least {plan.min_steps}"
    return TrainingOption(setting, footprint, blocked, possible, seconds, joules)


def exceeds_memory(footprint: Footprint, device: DeviceProfileConfig) -> bool:
    """Whether a pass might not fit the device's memory."""
    return MARGIN * footprint.peak_bytes > device.memory_gib * GIB


def pass_seconds(footprint: Footprint, device: DeviceProfileConfig) -> float:
    """Of one forward and backward pass: arithmetic at the rates of large operations, the rest at the memory's."""
    matrix = footprint.matrix_operations / (device.matrix_gflops * 1e9)
    convolution = footprint.convolution_operations / (device.convolution_gflops * 1e9)
    memory = footprint.moved_bytes / (device.bandwidth_gbs * 1e9)
    return (matrix + convolution + memory) * device.slowdown
