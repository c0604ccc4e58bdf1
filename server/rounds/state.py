"""State of a run: the shared adapter, the completed rounds, and the best of them."""

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
    """One completed round."""

    number: int
    train: TrainMetrics | None
    """None for round 0, before training."""
    validation: ValidationMetrics
    """Measured with the adapter after this round."""
    wall_seconds: float
    """Duration in seconds, on the server's clock."""

    @property
    def epsilon(self) -> float | None:
        """Largest ε per picture in any device's ledger by the end of the round; None without DP."""
        trained = self.train.epsilon if self.train else None
        return max((e for e in (trained, self.validation.epsilon) if e is not None), default=None)

    @property
    def guarantees(self) -> tuple[Guarantee, ...]:
        """Guarantees at the end of the round: per picture, per device, or both, which don't add up."""
        guarantees, spent = self.train.guarantees if self.train else (), self.epsilon
        return tuple(
            one if one.unit != IMAGE or spent is None else replace(one, value=max(one.value, spent))
            for one in guarantees
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class RunState:
    """A run after its last completed round; `start` makes the first state."""

    run: str
    private: bool
    """Whether the best round is fixed beforehand (the last one): choosing by validation would use the pictures, or the
    method of personalization needs the adapter of the last round."""
    adapter: Adapter
    history: tuple[Round, ...] = ()
    devices: Mapping[str, DeviceMetrics] = field(default_factory=dict)
    """Sums over all rounds, for each participating device. Metrics of single rounds are not kept per device: in a large
    fleet they would take most of the memory."""
    best_round: int = 0
    best_adapter: Adapter
    ledger: Anchor | None = None
    """State of the server's ledger after the last round; None without device-level privacy."""
    memory: StrategyState = field(default_factory=dict)
    """State that the strategy keeps across rounds besides the adapter, such as moments of the server optimizer."""

    @staticmethod
    def start(*, run: str, private: bool, adapter: Adapter) -> RunState:
        """Return the state before round 0.

        Args:
            run: id of the run.
            private: whether the best round is fixed beforehand.
            adapter: initial shared adapter.
        """
        return RunState(run=run, private=private, adapter=adapter, best_adapter=adapter)

    @property
    def round(self) -> int:
        """Number of the last completed round; -1 before round 0."""
        return len(self.history) - 1

    @property
    def best_score(self) -> float | None:
        """Relative loss reduction of the best adapter over the base; None if it wasn't measured."""
        return self.history[self.best_round].validation.score if self.history else None

    def after(
        self, round: Round, adapter: Adapter, ledger: Anchor | None = None, memory: StrategyState | None = None
    ) -> RunState:
        """Return the state with one more round.

        Args:
            round: the new round, with its per-device metrics, which are added to the sums.
            adapter: the shared adapter after the round.
            ledger: state of the server's ledger, under device-level privacy.
            memory: strategy state after the round.

        Raises:
            ValueError: the round doesn't follow the last one.
        """
        if round.number != self.round + 1:
            raise ValueError(f"round {round.number} can't follow round {self.round}")
        train, validation = round.train, round.validation
        record = replace(
            round, train=train and replace(train, devices={}), validation=replace(validation, devices={}, spent={})
        )
        devices, history = _add_evaluation(_add_training(self.devices, train), validation), (*self.history, record)
        state = replace(self, adapter=adapter, history=history, devices=devices, ledger=ledger, memory=memory or {})
        score, best = round.validation.score, self.best_score
        if score is not None and best is None and self.best_round == 0:
            best = 0.0  # the initial adapter doesn't change the base's output
        if self.private or best is None or (score is not None and score > best):
            state = replace(state, best_round=round.number, best_adapter=adapter)
        return state


def _add_training(before: Mapping[str, DeviceMetrics], train: TrainMetrics | None) -> Mapping[str, DeviceMetrics]:
    """Add one round's training metrics to the sums per device."""
    if train is None:
        return before
    return {
        **before,
        **{name: before[name].merge(metrics) if name in before else metrics for name, metrics in train.devices.items()},
    }


def _add_evaluation(before: Mapping[str, DeviceMetrics], validation: ValidationMetrics) -> Mapping[str, DeviceMetrics]:
    """Add the privacy cost of an evaluation to the sums per device; a device that never trained has only this cost."""
    idle = zero_metrics()
    return {
        **before,
        **{
            name: before.get(name, idle).merge(replace(idle, epsilon=spent)) for name, spent in validation.spent.items()
        },
    }
