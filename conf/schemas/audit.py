"""The typed schema of an audit, `conf/audit.yaml`: every key that exists, its unit and its limits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore

from conf.schemas.checks import require, require_choice


@dataclass
class CanariesConfig:
    """The one-run audit: pictures whose gradient is known, in the real training loop."""

    count: int = 10000  # canaries in all, each on its device with probability 1/2; 0: no such audit
    devices: int = 4
    epsilons: list[float] = field(default_factory=lambda: [1.0, 2.0, 4.0])  # claims; σ is solved for each
    delta: float = 1e-5
    sampling_rate: float = 0.2
    rounds: int = 20  # of one step each, all of them seen
    draws: int = 1  # noise multiplicity
    noise: str = "secure"  # as on a device; simulated: from the seed, for the same numbers again

    def __post_init__(self) -> None:
        require(self.count == 0 or self.count >= 32, f"canaries.count={self.count}: must be 0, or 32 or more")
        for name in ("devices", "rounds", "draws"):
            require(getattr(self, name) >= 1, f"canaries.{name}={getattr(self, name)}: must be 1 or more")
        few = not self.count or self.devices <= self.count
        require(few, f"canaries.devices={self.devices}: more than there are canaries")
        require(len(self.epsilons) > 0, "canaries.epsilons=[]: name a claim, or set canaries.count=0")
        for epsilon in self.epsilons:
            require(epsilon > 0, f"canaries.epsilons: {epsilon} must be over 0")
        require(0 < self.delta < 1, f"canaries.delta={self.delta}: must lie between 0 and 1")
        require(0 < self.sampling_rate <= 1, f"canaries.sampling_rate={self.sampling_rate}: must be over 0, at most 1")
        require_choice("canaries.noise", self.noise, ("secure", "simulated"))


@dataclass
class CanaryClientsConfig:
    """Canary clients against the clip and noise of a whole device."""

    count: int = 4000  # canary clients; 0: no such audit
    dimension: int = 10000  # numbers of their updates: a square
    epsilons: list[float] = field(default_factory=lambda: [1.0, 2.0, 4.0])
    delta: float = 1e-3
    rounds: int = 5  # in each of which all of them take part

    def __post_init__(self) -> None:
        require(self.count == 0 or self.count >= 32, f"clients.count={self.count}: must be 0, or 32 or more")
        enough = math.isqrt(self.dimension) ** 2 >= self.count
        require(enough, f"clients.dimension={self.dimension}: must be clients.count or more: each has one number")
        require(len(self.epsilons) > 0, "clients.epsilons=[]: name a claim, or set clients.count=0")
        for epsilon in self.epsilons:
            require(epsilon > 0, f"clients.epsilons: {epsilon} must be over 0")
        require(0 < self.delta < 1, f"clients.delta={self.delta}: must lie between 0 and 1")
        require(self.rounds >= 1, f"clients.rounds={self.rounds}: must be 1 or more")


@dataclass
class NoiseTestsConfig:
    """Situations in which everything but the noise is known: is it what it ought to be?"""

    longest: int = 2**20  # numbers of the longest release: what repeats itself within half of it is seen; 0: none
    noise: str = "secure"  # or simulated
    base: str | None = "glyphs"  # on which pictures are trained alone and together; null: on none

    def __post_init__(self) -> None:
        require(self.longest == 0 or self.longest >= 1024, f"fits.longest={self.longest}: must be 0, or 1024 or more")
        require_choice("fits.noise", self.noise, ("secure", "simulated"))


@dataclass
class MembershipConfig:
    """Attacks on the shared adapter of finished runs."""

    adapter: str = "best"  # which everybody is served; last: the one most trained, which the server holds too
    timesteps: int = 8  # of the loss
    time: float = 0.2  # of PIA and SimA, as a share of the schedule
    resamples: int = 2000  # of the writers, for intervals
    memory_gib: float | None = None  # null: a fixed share of the machine's

    def __post_init__(self) -> None:
        require_choice("membership.adapter", self.adapter, ("best", "last"))
        require(self.timesteps >= 1, f"membership.timesteps={self.timesteps}: must be 1 or more")
        require(0 < self.time < 1, f"membership.time={self.time}: must lie between 0 and 1")
        require(self.resamples >= 100, f"membership.resamples={self.resamples}: must be 100 or more")
        given = self.memory_gib
        require(given is None or given > 0, f"membership.memory_gib={given}: must be over 0, or null")


@dataclass
class AuditConfig:
    """What is put on trial."""

    runs: list[str] = field(default_factory=list)  # folders of finished runs; none: the training loop itself
    confidence: float = 0.95  # of each bound on ε that is shown
    false_alarms: float = 1e-6  # probability, at most, that an audit fails an honest mechanism
    seed: int = 0
    canaries: CanariesConfig = field(default_factory=CanariesConfig)
    clients: CanaryClientsConfig = field(default_factory=CanaryClientsConfig)
    fits: NoiseTestsConfig = field(default_factory=NoiseTestsConfig)
    membership: MembershipConfig = field(default_factory=MembershipConfig)

    def __post_init__(self) -> None:
        require(0.5 <= self.confidence < 1, f"confidence={self.confidence}: must lie between 0.5 and 1")
        alarms = self.false_alarms
        require(0 < alarms <= 0.05, f"false_alarms={alarms}: must be over 0, at most 0.05")
        something = len(self.runs) > 0 or self.canaries.count > 0 or self.clients.count > 0 or self.fits.longest > 0
        require(something, "nothing to audit: name runs, or ask for canaries, clients or fits")


ConfigStore.instance().store(name="audit_schema", node=AuditConfig)
