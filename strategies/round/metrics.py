"""Metrics of one round."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from privacy.accounting import Guarantee
from protocol.messages import ExamplePrivacy, TrainingPlan, Update
from strategies.round.plausibility import trimmed_mean

MAX_EVENTS_PER_ROUND = 6
"""Ledger entries of a device in one round: reserved, sealed and sent, for training and for evaluation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceMetrics:
    """Totals of one device over one or more rounds. Field names are stored in checkpoints."""

    rank: int
    """Largest rank that the device trained."""
    steps: int
    bytes_down: int
    bytes_up: int
    seconds: float
    joules: float
    epsilon: float | None
    """ε of its ledger so far, limited to the ε that the plans of this run explain; None without DP."""
    events: int = 0
    """Largest reported number of ledger entries that its rounds in this run can have written."""
    rounds: int = 0
    """Accepted updates."""
    asked: int = 0
    """Training requests, answered or not; under device-level privacy, rounds that it was selected for."""
    last: int = 0
    """Latest round in `asked`; 0 if none."""
    loss: float | None = None
    """Latest reported mean training loss; None under privacy, where it is not stored."""

    def merge(self, later: DeviceMetrics) -> DeviceMetrics:
        """Add the metrics of later rounds."""
        # The count is sent to the next device that uses this name, and a device refuses an impossible count. Its growth
        # is therefore bounded. If other runs write to the ledger too, it grows faster and the count is too low, which
        # is harmless: the count grants nothing.
        rounds = max(1, later.last - self.last)
        events = min(later.events, self.events + MAX_EVENTS_PER_ROUND * rounds) if self.events else later.events
        return replace(
            later,
            rank=max(self.rank, later.rank),
            steps=self.steps + later.steps,
            bytes_down=self.bytes_down + later.bytes_down,
            bytes_up=self.bytes_up + later.bytes_up,
            seconds=self.seconds + later.seconds,
            joules=self.joules + later.joules,
            epsilon=largest([self.epsilon, later.epsilon]),
            events=max(self.events, events),
            rounds=self.rounds + later.rounds,
            asked=self.asked + later.asked,
            last=max(self.last, later.last),
            loss=self.loss if later.loss is None else later.loss,
        )


@dataclass(frozen=True, kw_only=True)
class CentralDPMetrics:
    """Settings of the server's clip and noise in one round, and functions of the release."""

    guarantee: Guarantee
    """Per device, for all rounds so far and all planned evaluations."""
    clip: float
    """C, the clip of this round's updates."""
    next_clip: float
    deviation: float
    """Standard deviation of the noise on each number of the mean update."""
    snr: float
    """Signal-to-noise ratio of the mean update, estimated from it (`privacy.snr`)."""
    dropped: int
    """Non-finite updates, which count as zero."""
    release: bool
    """False for simulated noise."""


@dataclass(frozen=True, kw_only=True)
class TrainMetrics:
    """One round of training, as seen by the server. Field names are stored in checkpoints."""

    asked: int
    replied: int
    """Updates that were aggregated."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Rejected replies by reason; `no reply` counts missing ones."""
    bytes_down: int
    bytes_up: int
    """Adapter payloads of the accepted replies, without JSON and Flower's framing."""
    seconds: float
    """Time of the slowest device."""
    joules: float
    """Sum over all devices."""
    loss: float | None
    """Mean training loss over the devices that report it; under DP none does."""
    epsilon: float | None
    """Largest ε per picture of a device's ledger so far, limited to the ε that the plans of this run explain; None
    without DP."""
    told: float | None = None
    """Largest ε that a device reported in this round. It may include other runs or be false, and is not used."""
    guarantees: tuple[Guarantee, ...] = ()
    """Guarantees so far: per picture, per device, or both at once. They hold separately and must not be added."""
    central: CentralDPMetrics | None = None
    """Metrics of the server's clip and noise; None without central DP."""
    diagnostics: dict[str, float] = field(default_factory=dict)
    """Diagnostics of the aggregation; empty if the adapter was kept."""
    devices: dict[str, DeviceMetrics] = field(default_factory=dict)
    """Metrics of all devices that were asked, selected, or replied; empty in a run's history, which stores totals."""


def device_epsilon(train: TrainMetrics | None) -> float | None:
    """Return ε per device so far; None without device-level privacy."""
    return train.central.guarantee.value if train and train.central else None


@dataclass(frozen=True, kw_only=True)
class ValidationMetrics:
    """Quality of an adapter on the devices' own pictures: losses, or under privacy only a noised gain."""

    base: float | None
    """Trimmed mean over devices of the base's loss; None if no device reported one."""
    shared: float | None
    """Trimmed mean over the same devices of the adapter's loss."""
    improved: float | None = None
    """Trimmed mean over the same devices of the relative reduction of the base's loss. Rounds are compared by it, since
    the losses vary far more with the set of devices than between rounds."""
    gain: float | None = None
    """Mean reduction of the base's loss, clipped and noised; None without a private evaluation."""
    gain_error: float | None = None
    """Standard error of the gain due to its noise."""
    devices: dict[str, float] = field(default_factory=dict)
    """The adapter's loss on each device, or its noised gain; empty in a run's history."""
    epsilon: float | None = None
    """Largest ε per picture of a device's ledger, including this evaluation."""
    spent: dict[str, float] = field(default_factory=dict)
    """ε per picture of each device's ledger; empty in a run's history."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Rejected replies by reason."""

    @property
    def score(self) -> float | None:
        """Value by which rounds are compared; None if no device reported losses."""
        if self.improved is not None or not self.base or self.shared is None:
            return self.improved
        return (self.base - self.shared) / self.base  # a checkpoint without `improved`


@dataclass(frozen=True, kw_only=True)
class PersonalizationMetrics:
    """Cost of a personalization."""

    asked: int
    devices: tuple[str, ...]
    """Devices with a personal adapter."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Rejected replies by reason."""
    seconds: float
    """Time of the slowest device."""
    joules: float
    """Sum over all devices."""


def train_metrics(
    updates: Sequence[Update],
    *,
    round: int,
    plans: Mapping[tuple[str, int], TrainingPlan],
    not_contacted: Collection[str],
    bytes_down: int,
    bytes_up: Mapping[tuple[str, int], int],
    dropped: Mapping[str, int],
    private: ExamplePrivacy | None,
    spent: float | None,
    told: float | None = None,
    strict: float | None = None,
    central: CentralDPMetrics | None,
    diagnostics: Mapping[str, float],
) -> TrainMetrics:
    """Compute the metrics of a round from its accepted updates.

    Args:
        updates: accepted updates.
        round: number of the round.
        plans: plans of the devices that were asked, by device name and the plan's round.
        not_contacted: devices that count as asked (see `strategies.round.updates.RoundRequest`).
        bytes_down: bytes sent to all devices together.
        bytes_up: payload size of each accepted update, by device name and the plan's round. The payload itself may be
            gone.
        dropped: rejected replies by reason.
        private: example-level privacy of the plan.
        spent: largest ε per picture of any earlier round.
        told: largest ε reported in this round, explained or not.
        strict: upper bound of ε per picture at δ = `STRICT`; None if the plan's δ is no larger.
        central: metrics of the server's clip and noise.
        diagnostics: diagnostics of the aggregation.
    """
    spent = largest([spent, *(update.epsilon for update in updates)])
    per_image = (Guarantee(spent, private.delta, strict=strict),) if private and spent is not None else ()
    losses = [update.loss for update in updates if update.loss is not None and not (private or central)]
    return TrainMetrics(
        asked=len(plans),
        replied=len(updates),
        dropped=dict(dropped) | ({"not finite": central.dropped} if central and central.dropped else {}),
        bytes_down=bytes_down,
        bytes_up=sum(bytes_up.values()),
        seconds=max((update.seconds for update in updates), default=0.0),
        joules=sum(update.joules for update in updates),
        loss=trimmed_mean(losses),
        epsilon=spent,
        told=told,
        guarantees=per_image + ((central.guarantee,) if central else ()),
        central=central,
        diagnostics=dict(diagnostics),
        devices=_device_metrics(
            updates,
            plans,
            not_contacted,
            round,
            bytes_down=bytes_down // max(1, len(plans)),
            bytes_up=bytes_up,
            keep_losses=not (private or central),
        ),
    )


def _device_metrics(
    updates: Sequence[Update],
    plans: Mapping[tuple[str, int], TrainingPlan],
    not_contacted: Collection[str],
    round: int,
    *,
    bytes_down: int,
    bytes_up: Mapping[tuple[str, int], int],
    keep_losses: bool,
) -> dict[str, DeviceMetrics]:
    """Compute the metrics of each device that was asked or counts as asked, once or more.

    Args:
        updates: accepted updates.
        plans: see `train_metrics`.
        not_contacted: see `train_metrics`.
        round: number of the round.
        bytes_down: bytes sent to each device.
        bytes_up: see `train_metrics`.
        keep_losses: whether to store the devices' losses.
    """
    metrics: dict[str, DeviceMetrics] = {}
    for name in [*(name for name, _ in plans), *not_contacted]:
        asked = zero_metrics(asked=1, last=round)
        metrics[name] = metrics[name].merge(asked) if name in metrics else asked
    for update in updates:
        one = DeviceMetrics(
            rank=update.rank,
            steps=plans[update.device, update.round].steps,
            bytes_down=bytes_down,
            bytes_up=bytes_up[update.device, update.round],
            seconds=update.seconds,
            joules=update.joules,
            epsilon=update.epsilon,
            events=update.events,
            rounds=1,
            loss=update.loss if keep_losses else None,
        )
        metrics[update.device] = metrics[update.device].merge(one)
    return metrics


def zero_metrics(**values: Any) -> DeviceMetrics:
    """Make device metrics that are zero except for the given values."""
    zeros: dict[str, Any] = {"rank": 0, "steps": 0, "bytes_down": 0, "bytes_up": 0}
    return DeviceMetrics(**zeros | {"seconds": 0.0, "joules": 0.0, "epsilon": None} | values)


def largest(values: Iterable[float | None]) -> float | None:
    """Return the largest value that isn't None; None if there is none."""
    return max((value for value in values if value is not None), default=None)


def mean(values: Sequence[float]) -> float | None:
    """Compute the mean; None for no values."""
    return sum(values) / len(values) if values else None
