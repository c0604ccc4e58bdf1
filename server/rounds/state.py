"""Where a run stands: the shared adapter, the rounds so far, and the best of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from models.lora.adapter import Adapter
from privacy.accounting import IMAGE, Guarantee
from strategies.central_dp import Anchor
from strategies.round.metrics import DeviceMetrics, TrainMetrics, ValidationMetrics, zero_metrics
from strategies.server_optimizers import StrategyState


@dataclass(frozen=True, kw_only=True)
class Round:
    """One complete round."""

    number: int
    train: TrainMetrics | None
    """None for round 0, before any."""
    validation: ValidationMetrics
    """Of the adapter after this round."""
    wall_seconds: float
    """On the server's clock."""

    @property
    def epsilon(self) -> float | None:
        """The largest that a device's ledger has composed to by the end of the round, per picture; None without DP."""
        trained = self.train.epsilon if self.train else None
        return max((e for e in (trained, self.validation.epsilon) if e is not None), default=None)

    @property
    def guarantees(self) -> tuple[Guarantee, ...]:
        """What is promised at the end of the round, per picture, per device, or both at once, which don't add."""
        promised, spent = self.train.guarantees if self.train else (), self.epsilon
        return tuple(
            one if one.unit != IMAGE or spent is None else replace(one, value=max(one.value, spent)) for one in promised
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class RunState:
    """A run after its last complete round; `start` makes the first."""

    run: str
    private: bool
    """Whether the best round is fixed beforehand (the last): to choose by validation would look at the pictures."""
    adapter: Adapter
    history: tuple[Round, ...] = ()
    devices: Mapping[str, DeviceMetrics] = field(default_factory=dict)
    """What all rounds together took of each device that took part. Of single rounds nothing is kept by device: in a
    large fleet that would be most of the memory."""
    best_round: int = 0
    best_adapter: Adapter
    ledger: Anchor | None = None
    """Where the server's ledger stood when the last round was made; None without privacy per device."""
    memory: StrategyState = field(default_factory=dict)
    """What the server remembers of earlier rounds beside the adapter: the moments of its optimiser."""

    @staticmethod
    def start(*, run: str, private: bool, adapter: Adapter) -> RunState:
        """Before round 0."""
        return RunState(run=run, private=private, adapter=adapter, best_adapter=adapter)

    @property
    def round(self) -> int:
        """The last complete round; -1 before round 0."""
        return len(self.history) - 1

    @property
    def best_score(self) -> float | None:
        """What the best adapter takes off the base's loss, as a share of it; None where nobody measured it."""
        return self.history[self.best_round].validation.score if self.history else None

    def after(
        self, round: Round, adapter: Adapter, ledger: Anchor | None = None, memory: StrategyState | None = None
    ) -> RunState:
        """The state with one more round."""
        if round.number != self.round + 1:
            raise ValueError(f"round {round.number} can't follow round {self.round}")
        train, validation = round.train, round.validation
        record = replace(
            round, train=train and replace(train, devices={}), validation=replace(validation, devices={}, spent={})
        )
        devices, history = _measured(_summed(self.devices, train), validation), (*self.history, record)
        state = replace(self, adapter=adapter, history=history, devices=devices, ledger=ledger, memory=memory or {})
        score, best = round.validation.score, self.best_score
        if score is not None and best is None and self.best_round == 0:
            best = 0.0  # the adapter that training starts from adds nothing to the base
        if self.private or best is None or (score is not None and score > best):
            state = replace(state, best_round=round.number, best_adapter=adapter)
        return state


def _summed(before: Mapping[str, DeviceMetrics], train: TrainMetrics | None) -> Mapping[str, DeviceMetrics]:
    """The devices' sums with one more round."""
    if train is None:
        return before
    return {
        **before,
        **{name: before[name].then(facts) if name in before else facts for name, facts in train.devices.items()},
    }


def _measured(before: Mapping[str, DeviceMetrics], validation: ValidationMetrics) -> Mapping[str, DeviceMetrics]:
    """The devices' sums with what measuring cost them: of a device that never trained, that alone."""
    idle = zero_metrics()
    return {
        **before,
        **{name: before.get(name, idle).then(replace(idle, epsilon=spent)) for name, spent in validation.spent.items()},
    }
