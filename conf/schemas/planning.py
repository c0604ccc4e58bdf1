"""Schema of `anther plan`: a device of conf/device, a base, and a training budget.

Composed without Hydra, where `base` is a group of options of a simulation.
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
from conf.renames import PLAN, refuse_renamed
from conf.schemas.checks import is_regex, require

DEVICES = Path(__file__).parents[1] / "device"
THIS = "this"  # name of the device that this process runs on


@dataclass
class DeviceProfileConfig:
    """Capabilities of one kind of device. Its file says where each value comes from, and whether it was measured."""

    name: str = MISSING
    """Name of the device."""
    memory_gib: float = MISSING
    """Memory in GiB that a training process may use, beyond the system and other processes."""
    runtime_mib: float = MISSING
    """Memory in MiB that the process uses before a network is loaded, part of memory_gib."""
    matrix_gflops: float = MISSING
    """Sustained GFLOP/s of large fp32 matrix products."""
    convolution_gflops: float = MISSING
    """Sustained GFLOP/s of 3×3 convolutions."""
    bandwidth_gbs: float = MISSING
    """Bandwidth in 10⁹ bytes/s, read and written by an element-wise operation into fresh memory."""
    slowdown: float = 1.0
    """Ratio of the measured seconds of a training step to those predicted from the three rates."""
    watts_idle: float = MISSING
    """Power of the whole device at rest, in watts."""
    watts_busy: float = MISSING
    """Power of the whole device while training, in watts."""
    battery_wh: float | None = None
    """Battery capacity in watt-hours; null: no battery."""

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
    """A training run to plan, and its budget."""

    base: str = "sd15"
    """A full-size configuration by name, the folder of a pipeline, or a shipped base."""
    device: DeviceProfileConfig = field(default_factory=DeviceProfileConfig)
    sites: str | None = "attention"
    """Layers that have adapters in the run, as `adapter.sites`: attention, linear, all, or a regular expression; null:
    attention. If too many for the device, smaller sets of these names are tried."""
    rank: int = 8
    """Rank of the adapter."""
    steps: int = 100
    """Requested training steps; a plan may allow fewer."""
    min_steps: int = 20
    """Fewest training steps of an acceptable plan."""
    batch_size: int = 1
    """Pictures per step."""
    max_hours: float = 8.0
    """Time budget of the training in hours; the default is one night."""
    max_battery_fraction: float = 0.5
    """Energy budget, as a fraction of a full battery."""
    alternatives: int = 3
    """Plans shown above and below the best one."""

    def __post_init__(self) -> None:
        for key in ("rank", "steps", "min_steps", "batch_size"):
            require(getattr(self, key) >= 1, f"{key}={getattr(self, key)}: must be 1 or more")
        require(self.min_steps <= self.steps, f"min_steps={self.min_steps}: must not be over steps={self.steps}")
        require(self.max_hours > 0, f"max_hours={self.max_hours}: must be over 0")
        self.sites = self.sites or "attention"
        require(is_regex(self.sites), f"sites={self.sites}: not a regular expression")
        fraction = self.max_battery_fraction
        require(0 < fraction <= 1, f"max_battery_fraction={fraction}: must be over 0 and at most 1")
        require(self.alternatives >= 0, f"alternatives={self.alternatives}: must be 0 or more")


def devices() -> list[str]:
    """Return the names of all built-in device profiles."""
    return sorted(path.stem for path in DEVICES.glob("*.yaml"))


def compose_plan(words: Sequence[str], own: Path) -> PlanConfig:
    """Compose a plan from words such as `base=sd15 device=pi4_2gb device.memory_gib=1.2`.

    Args:
        words: `key=value` each; later ones override earlier ones.
        own: path of this device's profile, written by `anther device benchmark`.

    Raises:
        AntherError: a key or a value is refused, or there is no such device.
    """
    refuse_renamed(words, PLAN)
    named = [word.removeprefix("device=") for word in words if word.startswith("device=")]
    profile = _profile(named[-1] if named else THIS, own)
    overrides = [parse_override(word, PlanConfig) for word in words if not word.startswith("device=")]
    try:
        config = OmegaConf.merge(OmegaConf.structured(PlanConfig), {"device": profile}, *overrides)
    except OmegaConfBaseException as error:
        raise AntherError(explain(error, known_keys(PlanConfig), PLAN)) from error
    plan: PlanConfig = to_object(config, PlanConfig, PLAN)  # type: ignore[arg-type]
    return plan


def device_profile(name: str) -> DeviceProfileConfig:
    """Return a built-in device profile; AntherError if there is none of this name."""
    config = OmegaConf.merge(OmegaConf.structured(DeviceProfileConfig), _profile(name, DEVICES / f"{name}.yaml"))
    profile: DeviceProfileConfig = to_object(config, DeviceProfileConfig)  # type: ignore[arg-type]
    return profile


def _profile(name: str, own: Path) -> object:
    """Load the file of a device."""
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
