"""The schema of `anther device plan`: a device of conf/device, a base, and what training may take.

Composed without Hydra, for which `base` is a group of a simulation's options.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from common.errors import AntherError
from conf.cli import to_object
from conf.explain import explain, known_keys
from conf.key_value import parse_override
from conf.schemas.checks import require

DEVICES = Path(__file__).parents[1] / "device"
THIS = "this"  # the name of the device that we run on


@dataclass
class DeviceProfileConfig:
    """What one kind of device can do. Its file says of each value where it comes from, and whether it was measured."""

    name: str = MISSING
    memory_gib: float = MISSING  # that a training process may fill, after the system and what else runs
    runtime_mib: float = MISSING  # of it, what the process holds before there is a network
    matrix_gflops: float = MISSING  # sustained, of large fp32 matrix products
    convolution_gflops: float = MISSING  # sustained, of 3×3 convolutions
    bandwidth_gbs: float = MISSING  # read and written by an element-wise operation into fresh memory, 10⁹ bytes/s
    slowdown: float = 1.0  # seconds of a real training step over those that the three rates give
    watts_idle: float = MISSING
    watts_busy: float = MISSING  # while training, the whole device
    battery_wh: float | None = None  # null: none

    def __post_init__(self) -> None:
        limits = {
            "memory_gib": (0.1, 4096.0),
            "runtime_mib": (10.0, 8192.0),
            "matrix_gflops": (0.1, 1e6),
            "convolution_gflops": (0.1, 1e6),
            "bandwidth_gbs": (0.05, 1e4),
            "slowdown": (0.2, 20.0),
            "watts_idle": (0.0, 1000.0),
            "watts_busy": (0.1, 2000.0),
        }
        for key, (low, high) in limits.items():
            value = getattr(self, key)
            require(value == MISSING or low <= value <= high, f"device.{key}={value}: must be {low:g} to {high:g}")
        battery = self.battery_wh
        require(battery is None or battery > 0, f"device.battery_wh={battery}: must be over 0, or null for none")
        if MISSING not in (self.watts_idle, self.watts_busy):
            less = f"device.watts_idle={self.watts_idle}: must not be over watts_busy={self.watts_busy}"
            require(self.watts_idle <= self.watts_busy, less)


@dataclass
class PlanConfig:
    """What is to be planned, and what it may cost."""

    base: str = "sd15"  # a full-size configuration by its name, a pipeline's folder, or a shipped base
    device: DeviceProfileConfig = field(default_factory=DeviceProfileConfig)
    rank: int = 8
    steps: int = 100  # that training should have; a plan may have to do with fewer
    least_steps: int = 20  # with fewer than these a plan isn't worth it
    pictures: int = 1  # of a step
    hours: float = 8.0  # that training may take in all: a night
    battery_share: float = 0.5  # of a full battery that it may take
    rungs: int = 3  # shown above and below the best plan

    def __post_init__(self) -> None:
        for key in ("rank", "steps", "least_steps", "pictures"):
            require(getattr(self, key) >= 1, f"{key}={getattr(self, key)}: must be 1 or more")
        require(self.least_steps <= self.steps, f"least_steps={self.least_steps}: must not be over steps={self.steps}")
        require(self.hours > 0, f"hours={self.hours}: must be over 0")
        require(0 < self.battery_share <= 1, f"battery_share={self.battery_share}: must be over 0 and at most 1")
        require(self.rungs >= 0, f"rungs={self.rungs}: must be 0 or more")


def devices() -> list[str]:
    """The names of all profiles that come with Anther."""
    return sorted(path.stem for path in DEVICES.glob("*.yaml"))


def compose_plan(words: Sequence[str], own: Path) -> PlanConfig:
    """The plan that words such as `base=sd15 device=pi4_2gb device.memory_gib=1.2` ask for.

    Args:
        own: where `anther device benchmark` has left the profile of this device.

    Raises:
        AntherError: a key or a value is refused, or there is no such device.
    """
    named = [word.removeprefix("device=") for word in words if word.startswith("device=")]
    profile = _profile(named[-1] if named else THIS, own)
    asked = [parse_override(word, PlanConfig) for word in words if not word.startswith("device=")]
    try:
        config = OmegaConf.merge(OmegaConf.structured(PlanConfig), {"device": profile}, *asked)
    except OmegaConfBaseException as error:
        raise AntherError(explain(error, known_keys(PlanConfig))) from error
    found: PlanConfig = to_object(config, PlanConfig)  # type: ignore[arg-type]
    return found


def device_profile(name: str) -> DeviceProfileConfig:
    """The profile of a device that comes with Anther; AntherError if there is none of this name."""
    config = OmegaConf.merge(OmegaConf.structured(DeviceProfileConfig), _profile(name, DEVICES / f"{name}.yaml"))
    found: DeviceProfileConfig = to_object(config, DeviceProfileConfig)  # type: ignore[arg-type]
    return found


def _profile(name: str, own: Path) -> object:
    """What the file of a device says."""
    path = own if name == THIS else DEVICES / f"{name}.yaml"
    listed = f"name one of: {', '.join(devices())}"
    if name not in (THIS, *devices()):
        raise AntherError(f"device={name}: no such device: {listed}")
    if not path.is_file():
        raise AntherError(f"device=this: not measured yet: run `anther device benchmark`, or {listed}")
    try:
        return OmegaConf.load(path)
    except (OmegaConfBaseException, YAMLError) as error:
        raise AntherError(f"device={name}: {path} can't be read ({' '.join(str(error).split())})") from error
