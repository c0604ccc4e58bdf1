"""What one round came to, as numbers to report."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from privacy.accounting import Guarantee
from protocol.messages import ExamplePrivacy, TrainingPlan, Update
from strategies.round.plausibility import trimmed_mean

EVENTS = 6
"""Of one round in a device's ledger at most: reserved, sealed and sent, for training and for measuring."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceMetrics:
    """What one round took of one device, or several."""

    rank: int
    steps: int
    bytes_down: int
    bytes_up: int
    seconds: float
    joules: float
    epsilon: float | None
    """What its ledger has composed to so far, as far as this run's plans explain it; None without DP."""
    events: int = 0
    """The most that it has told of in its ledger, and that its rounds here can have written."""
    rounds: int = 0
    """Updates of it that were used."""
    asked: int = 0
    """Times that it was asked to train, whether or not it replied; with privacy per device, that it was picked."""
    last: int = 0
    """The last round of these; 0 before any."""
    loss: float | None = None
    """Mean training loss that it told last; None under privacy, where none is kept."""

    def then(self, later: DeviceMetrics) -> DeviceMetrics:
        """What both took together."""
        # A count that grows as it likes would be echoed to whoever has the name next, which refuses what it can't hold.
        # That of a device in other runs too grows faster: its echo then lags, and an echo permits nothing.
        rounds = max(1, later.last - self.last)
        events = min(later.events, self.events + EVENTS * rounds) if self.events else later.events
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
    """What the server's clip and noise came to in one round: its settings, and functions of what it released."""

    guarantee: Guarantee
    """Per device, of all rounds so far and of all that the run is going to measure."""
    clip: float
    """C that this round's updates were held to."""
    next_clip: float
    deviation: float
    """Standard deviation of the noise on each number of the mean update."""
    snr: float
    """Signal to noise of the mean update, estimated from it (`privacy.snr`)."""
    dropped: int
    """Updates that were not finite, and counted as zero."""
    release: bool
    """False for simulated noise."""


@dataclass(frozen=True, kw_only=True)
class TrainMetrics:
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
    """The largest that a device's ledger has composed to so far, per picture, as far as this run's plans explain it;
    None without DP."""
    told: float | None = None
    """The largest that one told in this round, which may be of other runs, or a lie: nothing goes by it."""
    guarantees: tuple[Guarantee, ...] = ()
    """What is promised so far: per picture, per device, or both at once, which don't add."""
    central: CentralDPMetrics | None = None
    """Of the server's clip and noise; None without them."""
    diagnostics: dict[str, float] = field(default_factory=dict)
    """From the aggregation; empty when the old adapter was kept."""
    devices: dict[str, DeviceMetrics] = field(default_factory=dict)
    """Of every device that was asked or picked, or whose reply came in; empty in a run's history, which keeps sums."""


def device_epsilon(train: TrainMetrics | None) -> float | None:
    """ε per device so far; None where none is promised."""
    return train.central.guarantee.value if train and train.central else None


@dataclass(frozen=True, kw_only=True)
class ValidationMetrics:
    """How one adapter does on the devices' own pictures: losses, or under privacy a noised gain alone."""

    base: float | None
    """Trimmed mean over devices of the base's loss; None if no device told one."""
    shared: float | None
    """Trimmed mean over the same devices of the adapter's loss."""
    improved: float | None = None
    """Trimmed mean over the same devices of the share of the base's loss that the adapter takes off it. Rounds are
    compared by it: which devices are there changes the losses far more than a round does."""
    gain: float | None = None
    """Mean of what the adapter takes off the base's loss, clipped and noised; None unless it was asked for so."""
    gain_error: float | None = None
    """Standard error of the gain by its noise alone."""
    devices: dict[str, float] = field(default_factory=dict)
    """The adapter's loss on each device, or its noised gain; empty in a run's history."""
    epsilon: float | None = None
    """The largest that a device's ledger has composed to, per picture, with this measurement."""
    spent: dict[str, float] = field(default_factory=dict)
    """The same of each device; empty in a run's history."""
    dropped: dict[str, int] = field(default_factory=dict)

    @property
    def score(self) -> float | None:
        """By which rounds are compared; None where nobody told losses."""
        if self.improved is not None or not self.base or self.shared is None:
            return self.improved
        return (self.base - self.shared) / self.base  # of a checkpoint from before there was one


@dataclass(frozen=True, kw_only=True)
class PersonalizationMetrics:
    """What it cost the devices to personalise."""

    asked: int
    devices: tuple[str, ...]
    """Those that have a personal adapter now."""
    dropped: dict[str, int] = field(default_factory=dict)
    seconds: float
    """Of the slowest device."""
    joules: float
    """Of all devices together."""


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
    """The facts of a round in which these updates were let in.

    Args:
        plans: of every device that was asked, by its name and the plan's round.
        passed: devices that count as asked, and were not (`strategies.round.updates.Asked`).
        bytes_down: of all of them together.
        bytes_up: of every update that was let in, by the same, which needn't be kept for that.
        dropped: replies that were not let in, by reason.
        private: of examples on each device.
        spent: the largest ε per picture of any round before.
        told: the largest that one told of in this, explained or not.
        strict: ε per picture at δ = `STRICT`, at most; None if the plan's δ is no larger.
    """
    spent = largest([spent, *(update.epsilon for update in updates)])
    of_images = (Guarantee(spent, private.delta, strict=strict),) if private and spent is not None else ()
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
        guarantees=of_images + ((central.guarantee,) if central else ()),
        central=central,
        diagnostics=dict(diagnostics),
        devices=_devices(
            updates,
            plans,
            not_contacted,
            round,
            bytes_down=bytes_down // max(1, len(plans)),
            bytes_up=bytes_up,
            told=not (private or central),
        ),
    )


def _devices(
    updates: Sequence[Update],
    plans: Mapping[tuple[str, int], TrainingPlan],
    not_contacted: Collection[str],
    round: int,
    *,
    bytes_down: int,
    bytes_up: Mapping[tuple[str, int], int],
    told: bool,
) -> dict[str, DeviceMetrics]:
    """Of every device that was asked or counts as such; it may have been so more than once.

    Args:
        bytes_down: to each.
        told: whether their losses are kept.
    """
    found: dict[str, DeviceMetrics] = {}
    for name in [*(name for name, _ in plans), *not_contacted]:
        asked = zero_metrics(asked=1, last=round)
        found[name] = found[name].then(asked) if name in found else asked
    for update in updates:
        facts = DeviceMetrics(
            rank=update.rank,
            steps=plans[update.device, update.round].steps,
            bytes_down=bytes_down,
            bytes_up=bytes_up[update.device, update.round],
            seconds=update.seconds,
            joules=update.joules,
            epsilon=update.epsilon,
            events=update.events,
            rounds=1,
            loss=update.loss if told else None,
        )
        found[update.device] = found[update.device].then(facts)
    return found


def zero_metrics(**facts: Any) -> DeviceMetrics:
    """Of a device that nothing was taken of, but for what is given."""
    idle: dict[str, Any] = {"rank": 0, "steps": 0, "bytes_down": 0, "bytes_up": 0}
    return DeviceMetrics(**idle | {"seconds": 0.0, "joules": 0.0, "epsilon": None} | facts)


def largest(values: Iterable[float | None]) -> float | None:
    """The largest of what was told; None where nothing was."""
    return max((value for value in values if value is not None), default=None)


def mean(values: Sequence[float]) -> float | None:
    """None of nothing."""
    return sum(values) / len(values) if values else None
