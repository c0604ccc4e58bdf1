"""What one round came to, as numbers to report."""

from __future__ import annotations

from dataclasses import dataclass, field, replace


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceFacts:
    """What one round took of one device, or several."""

    rank: int
    steps: int
    bytes_down: int
    bytes_up: int
    seconds: float
    joules: float
    epsilon: float | None
    """What its ledger has composed to so far; None without DP."""
    events: int = 0
    """The most that it has told of in its ledger."""

    def then(self, later: DeviceFacts) -> DeviceFacts:
        """What both took together."""
        return replace(
            later,
            rank=max(self.rank, later.rank),
            steps=self.steps + later.steps,
            bytes_down=self.bytes_down + later.bytes_down,
            bytes_up=self.bytes_up + later.bytes_up,
            seconds=self.seconds + later.seconds,
            joules=self.joules + later.joules,
            epsilon=max((e for e in (self.epsilon, later.epsilon) if e is not None), default=None),
            events=max(self.events, later.events),
        )


@dataclass(frozen=True, kw_only=True)
class TrainFacts:
    """One round of training, as the server saw it."""

    asked: int
    replied: int
    """Replies that went into the aggregate."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Replies that did not, by reason; `no reply` counts those that never came."""
    bytes_down: int
    bytes_up: int
    """Adapter payloads of the accepted replies; JSON and Flower's own framing come on top."""
    seconds: float
    """Of the slowest device."""
    joules: float
    """Of all devices together."""
    loss: float | None
    """Mean training loss over devices that tell it; under DP none does."""
    epsilon: float | None
    """The largest that a device's ledger has composed to, per picture; None without DP."""
    diagnostics: dict[str, float] = field(default_factory=dict)
    """From the aggregation; empty when the old adapter was kept."""
    devices: dict[str, DeviceFacts] = field(default_factory=dict)
    """Of every device whose reply was accepted, by name; empty in a run's history, which keeps sums."""


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Validation losses of one adapter on the devices' own pictures."""

    base: float | None
    """Mean over devices of the base's loss; None if no device replied."""
    shared: float | None
    """Mean over devices of the adapter's loss."""
    devices: dict[str, float] = field(default_factory=dict)
    """The adapter's loss on each device; empty in a run's history."""
    dropped: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PersonalFacts:
    """What it cost the devices to personalise."""

    asked: int
    devices: tuple[str, ...]
    """Those that have a personal adapter now."""
    dropped: dict[str, int] = field(default_factory=dict)
    seconds: float
    """Of the slowest device."""
    joules: float
    """Of all devices together."""
