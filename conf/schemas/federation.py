"""Schema of a federation, `conf/federation.yaml`: the settings of its rounds, in a simulation and on a server."""

from __future__ import annotations

from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore

from conf.components import GROUPS, Component, ComponentConfig, RobustRules, not_composed, robust_rules
from conf.schemas.checks import require, require_choice
from conf.schemas.cohort import CohortConfig
from conf.schemas.privacy import PrivacyConfig, PrivateEvalConfig
from conf.schemas.rounds import CompressionConfig, PlanningConfig, RoundLoopConfig
from conf.schemas.training import AdapterConfig, BaseConfig, ExpectedDataConfig


@dataclass
class TrackerConfig:
    """Metrics beside metrics.jsonl, which is always written."""

    tensorboard: bool = True
    """Write TensorBoard events."""


@dataclass
class LossConfig:
    """Evaluation of each round's adapter on the devices."""

    timesteps: int = 3
    """Fixed timesteps per held-out picture, each with one fixed noise."""

    def __post_init__(self) -> None:
        require(self.timesteps >= 1, f"evaluation.timesteps={self.timesteps}: must be 1 or more")


@dataclass
class FederationConfig:
    """Rounds of a federation."""

    rounds: int = 4
    """Rounds of the federation."""
    seed: int = 0
    """Seed of every random stream; the same seed gives the same numbers."""
    resume: bool = False
    """Continue an interrupted run."""
    base: BaseConfig = field(default_factory=BaseConfig)
    data: ExpectedDataConfig = field(default_factory=ExpectedDataConfig)
    cohort: CohortConfig = field(default_factory=CohortConfig)
    selection: Component = field(default_factory=not_composed)
    """Selection of the cohort.size devices of a round."""
    planning: PlanningConfig = field(default_factory=PlanningConfig)
    aggregation: Component = field(default_factory=not_composed)
    """The rule that combines the devices' adapters."""
    server_optimizer: Component = field(default_factory=not_composed)
    """The server's step along the mean update of a round (not with rules that rotate their factors)."""
    drift_correction: str = "none"
    """none; scaffold: control variates (requires adapter.shared.optimizer=sgd and a rule that averages comparable
    factors: fedit, ffa, fedsa or fedsb)."""
    robust: RobustRules = field(default_factory=dict)
    """Defenses against malicious updates, applied in the given order. replay, which comes first, rejects updates of
    earlier rounds; norm_bound, krum, foolsgold, afa and geometric_median judge whole updates; median or trimmed_mean,
    which comes last, works on entries of the product."""
    compression: CompressionConfig = field(default_factory=CompressionConfig)
    round_loop: RoundLoopConfig = field(default_factory=RoundLoopConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    private_eval: PrivateEvalConfig = field(default_factory=PrivateEvalConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    personalization: Component = field(default_factory=not_composed)
    """The method that makes a device's personal adapter; its training is set by adapter.personal."""
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    evaluation: LossConfig = field(default_factory=LossConfig)

    def __post_init__(self) -> None:
        for group in GROUPS:
            setattr(self, group, ComponentConfig.of(getattr(self, group)))
        self.robust = robust_rules(self.robust)
        require(self.rounds >= 1, f"rounds={self.rounds}: must be 1 or more")
        require_choice("drift_correction", self.drift_correction, ("none", "scaffold"))
        devices = self.data.known_count()
        for key, count in {"cohort.size": self.cohort.size, "cohort.eval_size": self.cohort.eval_size}.items():
            few = count is None or devices is None or count <= devices
            require(few, f"{key}={count}: there are only {devices} devices")


ConfigStore.instance().store(name="federation_schema", node=FederationConfig)
