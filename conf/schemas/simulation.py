"""Schema of a simulation, `conf/simulate.yaml`: a whole federation on one machine."""

from __future__ import annotations

from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from conf.schemas import sampling
from conf.schemas.checks import none_or_positive, require, require_choice
from conf.schemas.federation import FederationConfig, LossConfig
from conf.schemas.fleet import FleetConfig
from conf.schemas.training import DataConfig, TrainerConfig


@dataclass
class GridConfig:
    """The driver of the clients."""

    name: str = MISSING
    """cohort: jobs of many clients share passes; serial: one client at a time; ray: Flower's own simulation."""

    def __post_init__(self) -> None:
        require_choice("grid.name", self.name, ("cohort", "serial", "ray"))


@dataclass
class EvaluationConfig(LossConfig):
    """Evaluation of the final arms (base, local, shared, personal)."""

    devices: int | None = None
    """Devices that get a personal adapter and are evaluated; null: one per writer."""
    baseline_local: bool = True
    """Also train every device without the federation, for comparison; doubles the training work."""
    gallery_size: int = 4
    """Test glyphs drawn per writer; 0: no pictures, no judge."""
    sampler: str = sampling.SAMPLER
    """ddim; dpm: DPM-Solver++, better in few steps; lcm (consistency) or ancestral (turbo) for distilled bases."""
    sampling_steps: int = sampling.STEPS
    """Denoising steps of a drawn glyph."""
    guidance_scale: float = sampling.GUIDANCE_SCALE
    """Scale of guidance; 1: none."""
    guide_strength: float = sampling.GUIDE_STRENGTH
    """Strength of the personal adapter in guidance's unconditional prediction; 1: classifier-free guidance; less:
    guidance also strengthens the personal adapter (Karras et al., 2024, arXiv:2406.02507)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(none_or_positive(self.devices), f"evaluation.devices={self.devices}: must be 1 or more, or null")
        require(self.gallery_size >= 0, f"evaluation.gallery_size={self.gallery_size}: must be 0 or more")
        require_choice("evaluation.sampler", self.sampler, ("ddim", "dpm", "lcm", "ancestral"))
        require(self.sampling_steps >= 1, f"evaluation.sampling_steps={self.sampling_steps}: must be 1 or more")
        strength = self.guide_strength
        require(0 <= strength <= 1, f"evaluation.guide_strength={strength}: must be 0 to 1")
        require(self.guidance_scale >= 1, f"evaluation.guidance_scale={self.guidance_scale}: must be 1 or more")


@dataclass
class SimulationConfig(FederationConfig):
    """A whole federation on one machine: the rounds, and the simulated devices and writers."""

    data: DataConfig = field(default_factory=DataConfig)
    fleet: FleetConfig = field(default_factory=FleetConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    grid: GridConfig = field(default_factory=GridConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        devices, evaluated = self.data.known_count(), self.evaluation.devices
        few = evaluated is None or devices is None or evaluated <= devices
        require(few, f"evaluation.devices={evaluated}: there are only {devices} devices")
        require(not self.fleet.timed or self.grid.name != "ray", "grid=ray: can't be combined with fleet.timed=true")


ConfigStore.instance().store(name="simulation_schema", node=SimulationConfig)
