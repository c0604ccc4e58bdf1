"""Schemas of one round on the server: aggregation, planning, compression, server optimizer, robustness, round loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from conf.schemas.checks import none_or_positive, require, require_choice


@dataclass
class AggregationConfig:
    """The rule that combines the devices' adapters."""

    name: str = MISSING
    """Name of the rule (docs/strategies.md), of an installed plug-in, or module:Class."""
    max_rank: int | None = None
    """Highest rank of the global adapter (exact); null: no limit, and adapter.shared.rank for the other rules."""
    energy_fraction: float | None = None
    """Keep only the leading directions of the mean that hold this fraction of its σ² (exact); null: all."""
    weighting: str = "device"
    """Weights of the mean (exact): device (whole devices), or rank_slice (each slice of rank among the devices that
    trained it)."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of a plug-in's own."""

    def __post_init__(self) -> None:
        require(none_or_positive(self.max_rank), f"aggregation.max_rank={self.max_rank}: must be 1 or more, or null")
        part = self.energy_fraction
        wrong = f"aggregation.energy_fraction={part}: must be over 0 and at most 1, or null"
        require(part is None or 0 < part <= 1, wrong)
        require_choice("aggregation.weighting", self.weighting, ("device", "rank_slice"))


@dataclass
class PlanningConfig:
    """Assignment of a round's work to each device."""

    name: str = "full"
    """full: every device trains every site; device: each trains the most valuable sites that its memory, time and power
    allow."""
    deadline: float | None = None
    """Seconds that a round may take a device; slower devices get fewer steps; null: no limit."""
    max_joules: float | None = None
    """Energy that a round's training may take from a device, in joules: fewer steps beyond it; null: no limit."""
    max_battery_fraction: float | None = None
    """Fraction of its remaining charge that a round may take from a device that isn't charging: fewer steps beyond it;
    null: no limit."""
    metered_rank: int = 4
    """Rank asked of a device on a metered link (rules that mix ranks; not with privacy per device)."""

    def __post_init__(self) -> None:
        require(none_or_positive(self.deadline), f"planning.deadline={self.deadline}: must be over 0, or null")
        require(none_or_positive(self.max_joules), f"planning.max_joules={self.max_joules}: must be over 0, or null")
        part = self.max_battery_fraction
        wrong = f"planning.max_battery_fraction={part}: must be over 0 and at most 1, or null"
        require(part is None or 0 < part <= 1, wrong)
        require(self.metered_rank > 0, f"planning.metered_rank={self.metered_rank}: must be 1 or more")


@dataclass
class CompressionConfig:
    """Precision of uploads and downloads."""

    upload: str = "fp32"
    """Precision of uploads: fp32; or the change of the adapter in fp16, int8 or int4, rounded stochastically after any
    noise. Where factors stay comparable (fedit, ffa, fedsa, fedsb, hetlora) the rounding error enters the next
    round."""
    metered_upload: str | None = None
    """The same for devices on a metered link or with less than 2 Mbit/s up: fp16, int8 or int4, if that is fewer bits
    (not with privacy per device); null: as upload."""
    download: str = "fp32"
    """How adapters are sent to devices: fp32; or fp16, int8 or int4, rounded stochastically. The server keeps the
    rounding error, unless the rule rotates its factors (flexlora, flora, fedsvd, raflora)."""
    keep_fraction: float = 1.0
    """Fraction of a rounded change that is sent: its largest blocks; the others wait for a later round."""

    def __post_init__(self) -> None:
        require_choice("compression.upload", self.upload, ("fp32", "fp16", "int8", "int4"))
        if self.metered_upload is not None:
            require_choice("compression.metered_upload", self.metered_upload, ("fp16", "int8", "int4"))
        require_choice("compression.download", self.download, ("fp32", "fp16", "int8", "int4"))
        key = f"compression.keep_fraction={self.keep_fraction}"
        require(0 < self.keep_fraction <= 1, f"{key}: must be over 0 and at most 1")
        rounded = self.keep_fraction == 1 or self.upload != "fp32"
        require(rounded, f"{key}: requires compression.upload=int4, int8 or fp16")


@dataclass
class ServerOptimizerConfig:
    """The server's step along the mean update of a round (not with rules that rotate their factors)."""

    name: str = "none"
    """fedavgm, fedadam or fedyogi; none: the mean is the next adapter."""
    lr: float | None = None
    """η, the server's learning rate; null: 1 for fedavgm, 0.003 for fedadam and fedyogi."""
    momentum: float | None = None
    """β of fedavgm, β₁ of fedadam and fedyogi; null: 0.9."""
    beta2: float | None = None
    """β₂ (fedadam, fedyogi); null: 0.99."""
    tau: float | None = None
    """τ, the smallest change that still counts as one (fedadam, fedyogi); null: 0.001."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of a plug-in's own."""

    def __post_init__(self) -> None:
        require(none_or_positive(self.lr), f"server_optimizer.lr={self.lr}: must be over 0, or null")
        for name in ("momentum", "beta2"):
            value = getattr(self, name)
            require(value is None or 0 <= value < 1, f"server_optimizer.{name}={value}: must be 0 or more, and under 1")
        require(none_or_positive(self.tau), f"server_optimizer.tau={self.tau}: must be over 0")


@dataclass
class RobustConfig:
    """Defenses against malicious updates."""

    rules: list[str] = field(default_factory=list)
    """Applied in this order. replay, which comes first, rejects updates of earlier rounds; norm_bound, krum,
    foolsgold, afa and geometric_median judge whole updates; median or trimmed_mean, which comes last, works on
    entries of the product."""
    outlier_fraction: float | None = None
    """Fraction of devices that krum leaves out, and that trimmed_mean cuts at each end of an entry's values; null:
    0.2."""
    norm_bound: float | None = None
    """Bound on the norm of one device's change (norm_bound); null: norm_factor times the median."""
    norm_factor: float | None = None
    """Factor on the median norm of all changes (norm_bound); null: 1."""

    def __post_init__(self) -> None:
        cut = self.outlier_fraction
        require(cut is None or 0 <= cut < 0.5, f"robust.outlier_fraction={cut}: must be 0 or more, and under 0.5")
        require(none_or_positive(self.norm_bound), f"robust.norm_bound={self.norm_bound}: must be over 0, or null")
        require(none_or_positive(self.norm_factor), f"robust.norm_factor={self.norm_factor}: must be over 0")


@dataclass
class RoundLoopConfig:
    """When a round ends."""

    mode: str = "sync"
    """sync: a round waits for its devices; async: devices train all the time, and every buffer_size updates end a round
    (FedBuff). A simulation needs a timed fleet for async."""
    buffer_size: int | None = None
    """Updates per round with mode=async, one of each device; with fewer devices, a fraction of them; null: 10."""
    concurrency: int | None = None
    """Devices that train at the same time with mode=async; null: 10."""
    quorum: int = 1
    """Accepted replies that a round needs; with fewer it keeps the adapter."""
    timeout: float = 3600.0
    """Seconds that a round waits for available devices and for their replies."""

    def __post_init__(self) -> None:
        require_choice("round_loop.mode", self.mode, ("sync", "async"))
        size, working = self.buffer_size, self.concurrency
        require(none_or_positive(size), f"round_loop.buffer_size={size}: must be 1 or more, or null")
        require(none_or_positive(working), f"round_loop.concurrency={working}: must be 1 or more, or null")
        require(self.quorum >= 1, f"round_loop.quorum={self.quorum}: must be 1 or more")
        require(self.timeout > 0, f"round_loop.timeout={self.timeout}: must be over 0")
