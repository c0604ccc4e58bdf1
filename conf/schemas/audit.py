"""Schema of a privacy audit, `conf/audit.yaml`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore

from conf.schemas.checks import require, require_choice


@dataclass
class CanariesConfig:
    """One-run audit: pictures with known gradients in the real training loop."""

    count: int = 10000
    """Canaries in all, each on its device with probability 1/2; 0: skip this audit."""
    devices: int = 4
    """Devices that hold them."""
    epsilons: list[float] = field(default_factory=lambda: [1.0, 2.0, 4.0])
    """Claimed ε values; σ is solved for each."""
    delta: float = 1e-5
    """δ of each claim."""
    sampling_rate: float = 0.2
    """Probability that a step samples a picture."""
    rounds: int = 20
    """Rounds of one step each; the auditor sees all of them."""
    noise_multiplicity: int = 1
    """Draws of diffusion noise per picture and step."""
    noise: str = "secure"
    """secure (as on a device), or simulated (from the seed, reproducible)."""

    def __post_init__(self) -> None:
        require(self.count == 0 or self.count >= 32, f"canaries.count={self.count}: must be 0, or 32 or more")
        for name in ("devices", "rounds", "noise_multiplicity"):
            require(getattr(self, name) >= 1, f"canaries.{name}={getattr(self, name)}: must be 1 or more")
        few = not self.count or self.devices <= self.count
        require(few, f"canaries.devices={self.devices}: must not be over canaries.count")
        require(len(self.epsilons) > 0, "canaries.epsilons=[]: name a claim, or set canaries.count=0")
        for epsilon in self.epsilons:
            require(epsilon > 0, f"canaries.epsilons: {epsilon} must be over 0")
        require(0 < self.delta < 1, f"canaries.delta={self.delta}: must lie between 0 and 1")
        require(0 < self.sampling_rate <= 1, f"canaries.sampling_rate={self.sampling_rate}: must be over 0, at most 1")
        require_choice("canaries.noise", self.noise, ("secure", "simulated"))


@dataclass
class CanaryClientsConfig:
    """Canary clients against the clip and noise of device-level privacy."""

    count: int = 4000
    """Canary clients; 0: skip this audit."""
    dimension: int = 10000
    """Length of their updates: a square number."""
    epsilons: list[float] = field(default_factory=lambda: [1.0, 2.0, 4.0])
    """Claimed ε values."""
    delta: float = 1e-3
    """δ of each claim."""
    rounds: int = 5
    """Rounds; every client takes part in each."""

    def __post_init__(self) -> None:
        require(self.count == 0 or self.count >= 32, f"clients.count={self.count}: must be 0, or 32 or more")
        enough = math.isqrt(self.dimension) ** 2 >= self.count
        require(
            enough, f"clients.dimension={self.dimension}: must be clients.count or more: each client has its own entry"
        )
        require(len(self.epsilons) > 0, "clients.epsilons=[]: name a claim, or set clients.count=0")
        for epsilon in self.epsilons:
            require(epsilon > 0, f"clients.epsilons: {epsilon} must be over 0")
        require(0 < self.delta < 1, f"clients.delta={self.delta}: must lie between 0 and 1")
        require(self.rounds >= 1, f"clients.rounds={self.rounds}: must be 1 or more")


@dataclass
class NoiseTestsConfig:
    """Tests of the noise distribution, in settings where everything else is known."""

    max_length: int = 2**20
    """Length of the longest release. A period of up to half this length is detected; 0: skip these tests."""
    noise: str = "secure"
    """secure, or simulated."""
    base: str | None = "glyphs"
    """Base on which pictures are trained separately and together; null: none."""

    def __post_init__(self) -> None:
        length = self.max_length
        require(length == 0 or length >= 1024, f"noise_tests.max_length={length}: must be 0, or 1024 or more")
        require_choice("noise_tests.noise", self.noise, ("secure", "simulated"))


@dataclass
class MembershipConfig:
    """Membership inference against the shared adapter of finished runs."""

    adapter: str = "best"
    """best (sent to every device), or last (the most trained, which the server also holds)."""
    timesteps: int = 8
    """Timesteps of the loss attack."""
    timestep_fraction: float = 0.2
    """Timestep of PIA and SimA, as a fraction of the schedule."""
    bootstrap_samples: int = 2000
    """Bootstrap resamples of the writers, for confidence intervals."""
    memory_gib: float | None = None
    """Memory budget in GiB; null: a fixed fraction of the machine's."""

    def __post_init__(self) -> None:
        require_choice("membership.adapter", self.adapter, ("best", "last"))
        require(self.timesteps >= 1, f"membership.timesteps={self.timesteps}: must be 1 or more")
        fraction = self.timestep_fraction
        require(0 < fraction < 1, f"membership.timestep_fraction={fraction}: must lie between 0 and 1")
        samples = self.bootstrap_samples
        require(samples >= 100, f"membership.bootstrap_samples={samples}: must be 100 or more")
        memory = self.memory_gib
        require(memory is None or memory > 0, f"membership.memory_gib={memory}: must be over 0, or null")


@dataclass
class AuditConfig:
    """Subjects and confidence of an audit."""

    runs: list[str] = field(default_factory=list)
    """Folders of finished runs; empty: the training loop itself."""
    confidence: float = 0.95
    """Confidence of each reported bound on ε."""
    false_alarm_rate: float = 1e-6
    """Largest probability that an audit fails an honest mechanism."""
    seed: int = 0
    """Seed of the audit."""
    canaries: CanariesConfig = field(default_factory=CanariesConfig)
    clients: CanaryClientsConfig = field(default_factory=CanaryClientsConfig)
    noise_tests: NoiseTestsConfig = field(default_factory=NoiseTestsConfig)
    membership: MembershipConfig = field(default_factory=MembershipConfig)

    def __post_init__(self) -> None:
        require(0.5 <= self.confidence < 1, f"confidence={self.confidence}: must lie between 0.5 and 1")
        alarms = self.false_alarm_rate
        require(0 < alarms <= 0.05, f"false_alarm_rate={alarms}: must be over 0, at most 0.05")
        audits = (len(self.runs), self.canaries.count, self.clients.count, self.noise_tests.max_length)
        require(
            any(audits), "nothing to audit: name runs, or set canaries.count, clients.count or noise_tests.max_length"
        )


ConfigStore.instance().store(name="audit_schema", node=AuditConfig)
