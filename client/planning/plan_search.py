"""Search the settings with which a device can train a base, from the best to the leanest.

An option is a quality (resolution first, then the trained sites, then the bits of the base), with or without
checkpointing, which costs only time. Microbatches have the fastest size that fits.
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
    """Resolution, sites and precision of training."""

    resolution: int  # side of a picture in pixels
    sites: str  # name of a set of sites
    weights: str  # one of `models.quantization.modes.WEIGHT_MODES`
    checkpointing: str = CHECKPOINTING_MODES[-1]
    batch: int = 1  # pictures per microbatch


@dataclass(frozen=True)
class TrainingOption:
    """Predicted cost of a setting on a device, and the reason why it is infeasible, if any."""

    setting: TrainingSetting
    footprint: Footprint
    blocked: str | None = None
    steps: int = 0  # number of steps that time and battery allow; 0, like the next two, if memory is too small
    seconds: float = 0.0  # per step
    joules: float = 0.0  # per step, of the whole device

    def battery_share(self, device: DeviceProfileConfig) -> float | None:
        """Return the fraction of a full battery that all steps use; None without a battery."""
        return None if device.battery_wh is None else self.steps * self.joules / HOUR / device.battery_wh


FootprintPredictor = Callable[[TrainingSetting], Footprint]


def settings(resolutions: Sequence[int], sites: Sequence[str], weights: Sequence[str]) -> list[TrainingSetting]:
    """List all combinations, best first, of lists that are each sorted from best to leanest.

    Args:
        resolutions: sides of a picture in pixels.
        sites: names of sets of sites.
        weights: precisions of the base.
    """
    return [TrainingSetting(*each) for each in product(resolutions, sites, weights, CHECKPOINTING_MODES)]


def search_plans(
    settings: Sequence[TrainingSetting], plan: PlanConfig, predict: FootprintPredictor
) -> tuple[list[TrainingOption], int | None]:
    """Find the best feasible option.

    Args:
        settings: candidates, best first.
        plan: the device and the limits of time, battery and steps.
        predict: the memory and arithmetic of a setting.

    Returns:
        The options from the first to the best and `plan.alternatives` below it, and the index of the best; None if
            none is feasible.
    """
    options: list[TrainingOption] = []
    best = None
    for setting in settings:
        if best is not None and len(options) > best + plan.alternatives:
            break
        options.append(fastest_option(setting, plan, predict))
        if best is None and options[-1].blocked is None:
            best = len(options) - 1
    return options, best


def fastest_option(setting: TrainingSetting, plan: PlanConfig, predict: FootprintPredictor) -> TrainingOption:
    """Evaluate a setting with the fastest microbatch that fits; if none fits, with the smallest.

    Args:
        setting: the setting, with a microbatch of one.
        plan: the device and its limits.
        predict: the memory and arithmetic of a setting.
    """
    option = evaluate_option(setting, plan, predict)
    if exceeds_memory(option.footprint, plan.device):
        return option
    for power in range(1, plan.batch_size.bit_length()):
        larger = evaluate_option(replace(setting, batch=2**power), plan, predict)
        if exceeds_memory(larger.footprint, plan.device):
            break
        option = min(option, larger, key=lambda candidate: candidate.seconds)
    return option


def evaluate_option(setting: TrainingSetting, plan: PlanConfig, predict: FootprintPredictor) -> TrainingOption:
    """Evaluate one setting on the plan's device.

    Args:
        setting: the setting.
        plan: the device and its limits.
        predict: the memory and arithmetic of a setting.
    """
    footprint, device = predict(setting), plan.device
    if exceeds_memory(footprint, device):
        needed = f"{MARGIN * footprint.peak_bytes / MIB:,.0f}"
        return TrainingOption(setting, footprint, f"memory: {needed} of {device.memory_gib * GIB / MIB:,.0f}")
    seconds = -(-plan.batch_size // setting.batch) * pass_seconds(footprint, device)
    joules = seconds * device.watts_busy
    steps = {"time": plan.max_hours * HOUR / seconds}
    if device.battery_wh is not None:
        steps["battery"] = plan.max_battery_fraction * device.battery_wh * HOUR / joules
    limiting = min(steps, key=lambda name: steps[name])
    possible, blocked = min(plan.steps, int(steps[limiting])), None
    if possible < plan.min_steps:
        blocked = f"{limiting}: {possible} steps, of at least {plan.min_steps}"
    return TrainingOption(setting, footprint, blocked, possible, seconds, joules)


def exceeds_memory(footprint: Footprint, device: DeviceProfileConfig) -> bool:
    """Return whether a pass might not fit the device's memory."""
    return MARGIN * footprint.peak_bytes > device.memory_gib * GIB


def pass_seconds(footprint: Footprint, device: DeviceProfileConfig) -> float:
    """Predict the seconds of one forward and backward pass.

    Large operations run at the device's arithmetic rates, all others at its memory bandwidth.

    Args:
        footprint: the pass's operations and bytes.
        device: the device's rates.
    """
    matrix = footprint.matrix_operations / (device.matrix_gflops * 1e9)
    convolution = footprint.convolution_operations / (device.convolution_gflops * 1e9)
    memory = footprint.moved_bytes / (device.bandwidth_gbs * 1e9)
    return (matrix + convolution + memory) * device.slowdown
