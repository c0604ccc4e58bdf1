"""Schemas of one round on the server: planning, compression and the round loop."""

from __future__ import annotations

from dataclasses import dataclass

from conf.schemas.checks import none_or_positive, require, require_choice


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
class RoundLoopConfig:
    """When a round ends."""

    name: str = "sync"
    """sync: a round waits for its devices; async: devices train all the time, and every buffer_size updates end a round
    (FedBuff). A simulation needs a timed fleet for async."""
    buffer_size: int | None = None
    """Updates per round (async, 10 there), one of each device; with fewer devices, a fraction of them."""
    concurrency: int | None = None
    """Devices that train at the same time (async, 10 there)."""
    quorum: int = 1
    """Accepted replies that a round needs; with fewer it keeps the adapter."""
    timeout: float = 3600.0
    """Seconds that a round waits for available devices and for their replies."""

    def __post_init__(self) -> None:
        require_choice("round_loop", self.name, ("sync", "async"))
        for key in ("buffer_size", "concurrency"):
            value, shown = getattr(self, key), f"round_loop.{key}={getattr(self, key)}".replace("None", "null")
            require(value is None or self.name == "async", f"{shown}: only used by round_loop=async; remove it")
            positive = value is not None and value > 0
            require(positive or self.name != "async", f"{shown}: must be 1 or more with round_loop=async")
        require(self.quorum >= 1, f"round_loop.quorum={self.quorum}: must be 1 or more")
        require(self.timeout > 0, f"round_loop.timeout={self.timeout}: must be over 0")
