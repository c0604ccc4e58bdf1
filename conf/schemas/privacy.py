"""Schemas of differential privacy: the guarantees per picture and per device, and private evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from conf.schemas.checks import none_or_positive, require, require_choice


@dataclass
class PrivateEvalConfig:
    """Progress of a private run, shown to its operator: a noised gain, paid from the same ε."""

    interval: int = 0
    """Rounds between evaluations; 0: none."""
    noise_multiplier: float = 10.0
    """σ of each evaluation, in units of clip."""
    clip: float = 0.1
    """Bound on the change of one unit's loss."""

    def __post_init__(self) -> None:
        require(self.interval >= 0, f"private_eval.interval={self.interval}: must be 0 or more")
        sigma = self.noise_multiplier
        require(sigma > 0, f"private_eval.noise_multiplier={sigma}: must be over 0")
        require(self.clip > 0, f"private_eval.clip={self.clip}: must be over 0")


@dataclass
class DevicePrivacyConfig:
    """The server's clipping and noise, once per round; the unit of privacy is all data of one device."""

    clip_norm: float = 1.0
    """Bound on the norm of one device's update; the initial bound if it is adaptive."""
    target_quantile: float | None = None
    """Adaptive clipping (arXiv:1905.03871): fraction of updates below the bound; null: a fixed bound."""
    clip_norm_lr: float = 0.2
    """Step of an adaptive bound per round, as a power of e."""
    max_participations: int | None = None
    """Maximum rounds per device; σ is solved for this number. null: all rounds."""
    epsilon: float | None = None
    """ε; null: privacy.epsilon."""
    delta: float | None = None
    """δ; null: privacy.delta."""

    def __post_init__(self) -> None:
        require(self.clip_norm > 0, f"privacy.device.clip_norm={self.clip_norm}: must be over 0")
        share = self.target_quantile
        between = share is None or 0 < share < 1
        require(between, f"privacy.device.target_quantile={share}: must lie between 0 and 1, or null")
        require(self.clip_norm_lr > 0, f"privacy.device.clip_norm_lr={self.clip_norm_lr}: must be over 0")
        maximum = self.max_participations
        require(none_or_positive(maximum), f"privacy.device.max_participations={maximum}: must be 1 or more, or null")
        require(none_or_positive(self.epsilon), f"privacy.device.epsilon={self.epsilon}: must be over 0, or null")
        delta = self.delta
        require(delta is None or 0 < delta < 1, f"privacy.device.delta={delta}: must lie between 0 and 1, or null")


@dataclass
class PrivacyConfig:
    """The guarantee per picture, per device, or both."""

    level: str = MISSING
    """none; example: DP-SGD on the device; device: clip and noise on the server; both."""
    epsilon: float = 8.0
    """ε of all rounds and evaluations together; σ is solved for it."""
    delta: float = 1e-3
    """δ of the guarantee."""
    clip_norm: float = 0.01
    """C, the bound on the norm of one picture's gradient."""
    noise_multiplicity: int = 1
    """Draws of diffusion noise and timestep per picture; their gradients are averaged before clipping."""
    device: DevicePrivacyConfig = field(default_factory=DevicePrivacyConfig)

    def __post_init__(self) -> None:
        require_choice("privacy.level", self.level, ("none", "example", "device", "both"))
        require(self.epsilon > 0, f"privacy.epsilon={self.epsilon}: must be over 0")
        require(0 < self.delta < 1, f"privacy.delta={self.delta}: must lie between 0 and 1")
        require(self.clip_norm > 0, f"privacy.clip_norm={self.clip_norm}: must be over 0")
        draws = self.noise_multiplicity
        require(draws >= 1, f"privacy.noise_multiplicity={draws}: must be 1 or more")

    @property
    def of_examples(self) -> bool:
        """Whether devices train by DP-SGD."""
        return self.level in ("example", "both")

    @property
    def of_devices(self) -> bool:
        """Whether the server clips and noises the devices' updates."""
        return self.level in ("device", "both")
