"""The ladder: every way in which a device could train a base, from the best down, and which of them it can.

A rung is a quality: resolution first, then the sites that are trained, then the bits of the base. How it is run is a
matter of speed alone: the fastest of what fits, with or without checkpoints, in micro-batches of any size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from conf.planning import DeviceProfile, Plan
from models.footprint import CHECKPOINTING, Footprint

GIB, MIB = 2**30, 2**20
HOUR = 3600
MARGIN = 1.05  # a prediction may be that much under (`bench.predicted`): a plan that is accepted must not be killed


@dataclass(frozen=True)
class Setting:
    """One way to train."""

    resolution: int  # side of a picture in pixels
    sites: str  # name of a set of sites
    weights: str  # one of `models.weights.MODES`
    checkpointing: str = CHECKPOINTING[-1]  # the leanest unless it is said otherwise
    batch: int = 1  # pictures of a micro-batch


@dataclass(frozen=True)
class Rung:
    """What a setting takes of a device, and what stands against it."""

    setting: Setting
    footprint: Footprint
    seconds: float  # of a step
    joules: float  # of a step, the whole device
    steps: int  # that there is time and battery for
    blocked: str | None = None

    def battery_share(self, device: DeviceProfile) -> float | None:
        """Of a full battery, for all steps; None without one."""
        return None if device.battery_wh is None else self.steps * self.joules / HOUR / device.battery_wh


Predict = Callable[[Setting], Footprint]


def qualities(resolutions: Sequence[int], sites: Sequence[str], weights: Sequence[str]) -> list[Setting]:
    """All of them, each list from its best to its leanest."""
    return [Setting(*each) for each in product(resolutions, sites, weights)]


def ladder(settings: Sequence[Setting], plan: Plan, predict: Predict) -> tuple[list[Rung], int | None]:
    """The rungs from the top to the best that fits and `plan.rungs` below it, and which one that is.

    None fits: all of them are blocked, and there is no best.
    """
    rungs: list[Rung] = []
    best = None
    for setting in settings:
        if best is not None and len(rungs) > best + plan.rungs:
            break
        rungs.append(fastest(setting, plan, predict))
        if best is None and rungs[-1].blocked is None:
            best = len(rungs) - 1
    return rungs, best


def fastest(setting: Setting, plan: Plan, predict: Predict) -> Rung:
    """The fastest way to run a quality of those that fit; if none does, the leanest, which says what blocks it."""
    leanest = rung(setting, plan, predict)
    if too_large(leanest.footprint, plan.device):
        return leanest
    found = [leanest]
    for faster in _faster(setting, plan.pictures):
        candidate = rung(faster, plan, predict)
        if not too_large(candidate.footprint, plan.device):
            found.append(candidate)
    return min(found, key=lambda candidate: candidate.seconds)


def _faster(setting: Setting, pictures: int) -> Iterator[Setting]:
    """The same without checkpoints, and in larger micro-batches."""
    batches = [2**power for power in range(pictures.bit_length()) if 2**power <= pictures]
    for checkpointing, batch in product(CHECKPOINTING, batches):
        other = replace(setting, checkpointing=checkpointing, batch=batch)
        if other != setting:
            yield other


def rung(setting: Setting, plan: Plan, predict: Predict) -> Rung:
    """One setting against one device."""
    footprint, device = predict(setting), plan.device
    seconds = -(-plan.pictures // setting.batch) * pass_seconds(footprint, device)
    joules = seconds * device.watts_busy
    steps = {"time": plan.hours * HOUR / seconds}
    if device.battery_wh is not None:
        steps["battery"] = plan.battery_share * device.battery_wh * HOUR / joules
    scarce = min(steps, key=lambda name: steps[name])
    possible = min(plan.steps, int(steps[scarce]))
    blocked = None
    if too_large(footprint, device):
        least = f"{MARGIN * footprint.peak_bytes / MIB:,.0f}"
        blocked = f"memory: {least} of {device.memory_gib * GIB / MIB:,.0f} MiB"
    elif possible < plan.least_steps:
        blocked = f"{scarce}: enough for {possible} steps, of at least {plan.least_steps}"
    return Rung(setting, footprint, seconds, joules, possible, blocked)


def too_large(footprint: Footprint, device: DeviceProfile) -> bool:
    """Whether a pass might not fit the device's memory."""
    return MARGIN * footprint.peak_bytes > device.memory_gib * GIB


def pass_seconds(footprint: Footprint, device: DeviceProfile) -> float:
    """Of one forward and backward pass: arithmetic at the rates of large operations, the rest at the memory's."""
    matrix = footprint.matrix_operations / (device.matrix_gflops * 1e9)
    convolution = footprint.convolution_operations / (device.convolution_gflops * 1e9)
    memory = footprint.moved_bytes / (device.bandwidth_gbs * 1e9)
    return (matrix + convolution + memory) * device.slowdown
