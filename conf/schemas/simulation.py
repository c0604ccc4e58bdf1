"""Schema of a simulation, `conf/simulate.yaml`: a whole federation on one machine."""

from __future__ import annotations

from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from conf.schemas.checks import none_or_positive, require, require_choice
from conf.schemas.cohort import CohortConfig, SelectionConfig
from conf.schemas.fleet import FleetConfig
from conf.schemas.privacy import PrivacyConfig, PrivateEvalConfig
from conf.schemas.rounds import (
    AggregationConfig,
    CompressionConfig,
    PlanningConfig,
    RobustConfig,
    RoundLoopConfig,
    ServerOptimizerConfig,
)
from conf.schemas.training import AdapterConfig, BaseConfig, DataConfig, TrainerConfig


@dataclass
class GridConfig:
    """The driver of the clients."""

    name: str = MISSING
    """cohort: jobs of many clients share passes; serial: one client at a time; ray: Flower's own simulation."""

    def __post_init__(self) -> None:
        require_choice("grid.name", self.name, ("cohort", "serial", "ray"))


@dataclass
class TrackerConfig:
    """Metrics beside metrics.jsonl, which is always written."""

    tensorboard: bool = True
    """Write TensorBoard events."""


@dataclass
class EvaluationConfig:
    """Evaluation of the final arms (base, local, shared, personal)."""

    devices: int | None = None
    """Devices that get a personal adapter and are evaluated; null: one per writer."""
    baseline_local: bool = True
    """Also train every device without the federation, for comparison; doubles the training work."""
    timesteps: int = 3
    """Fixed timesteps per held-out glyph, each with one fixed noise."""
    gallery_size: int = 4
    """Test glyphs drawn per writer; 0: no pictures, no judge."""
    sampler: str = "ddim"
    """ddim; dpm: DPM-Solver++, better in few steps; lcm (consistency) or ancestral (turbo) for distilled bases."""
    sampling_steps: int = 6
    """Denoising steps of a drawn glyph."""
    guidance_scale: float = 1.5
    """Scale of classifier-free guidance; 1: none."""

    def __post_init__(self) -> None:
        require(none_or_positive(self.devices), f"evaluation.devices={self.devices}: must be 1 or more, or null")
        require(self.timesteps >= 1, f"evaluation.timesteps={self.timesteps}: must be 1 or more")
        require(self.gallery_size >= 0, f"evaluation.gallery_size={self.gallery_size}: must be 0 or more")
        require_choice("evaluation.sampler", self.sampler, ("ddim", "dpm", "lcm", "ancestral"))
        require(self.sampling_steps >= 1, f"evaluation.sampling_steps={self.sampling_steps}: must be 1 or more")
        require(self.guidance_scale >= 1, f"evaluation.guidance_scale={self.guidance_scale}: must be 1 or more")


@dataclass
class SimulationConfig:
    """A whole federation on one machine."""

    rounds: int = 4
    """Rounds of the federation."""
    seed: int = 0
    """Seed of every random stream; the same seed gives the same numbers."""
    resume: bool = False
    """Continue the run in hydra.run.dir."""
    base: BaseConfig = field(default_factory=BaseConfig)
    data: DataConfig = field(default_factory=DataConfig)
    fleet: FleetConfig = field(default_factory=FleetConfig)
    cohort: CohortConfig = field(default_factory=CohortConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    planning: PlanningConfig = field(default_factory=PlanningConfig)
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)
    server_optimizer: ServerOptimizerConfig = field(default_factory=ServerOptimizerConfig)
    drift_correction: str = "none"
    """none; scaffold: control variates (requires adapter.shared.optimizer=sgd and a rule that averages comparable
    factors: fedit, ffa, fedsa or fedsb)."""
    robust: RobustConfig = field(default_factory=RobustConfig)
    compression: CompressionConfig = field(default_factory=CompressionConfig)
    round_loop: RoundLoopConfig = field(default_factory=RoundLoopConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    private_eval: PrivateEvalConfig = field(default_factory=PrivateEvalConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    grid: GridConfig = field(default_factory=GridConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        require(self.rounds >= 1, f"rounds={self.rounds}: must be 1 or more")
        require_choice("drift_correction", self.drift_correction, ("none", "scaffold"))
        devices, cohort = self.data.count(), self.cohort
        limited = {"cohort.size": cohort.size, "cohort.eval_size": cohort.eval_size}
        for key, count in {**limited, "evaluation.devices": self.evaluation.devices}.items():
            require(count is None or count <= devices, f"{key}={count}: there are only {devices} devices")
        require(not self.fleet.timed or self.grid.name != "ray", "grid=ray: can't be combined with fleet.timed=true")


ConfigStore.instance().store(name="simulation_schema", node=SimulationConfig)
