"""Server's record of the devices of a run, from all finished rounds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from strategies.round.metrics import DeviceMetrics, TrainMetrics, ValidationMetrics, largest


@dataclass(frozen=True, kw_only=True)
class TrainingHistory:
    """Totals over all rounds so far."""

    devices: Mapping[str, DeviceMetrics] = field(default_factory=dict)
    """Totals of each device, by name."""
    losses: tuple[float, ...] = ()
    """Training loss of each round that has one."""
    spent: float | None = None
    """Largest ε per picture that any device reported."""

    @staticmethod
    def of(devices: Mapping[str, DeviceMetrics], rounds: Iterable[TrainMetrics | None] = ()) -> TrainingHistory:
        """Make the history of a run from its state.

        Args:
            devices: totals of each device.
            rounds: metrics of each round; None for a round without training.
        """
        return TrainingHistory(
            devices=devices,
            losses=tuple(metrics.loss for metrics in rounds if metrics and metrics.loss is not None),
            spent=largest(metrics.epsilon for metrics in devices.values()),
        )

    def after_training(self, metrics: TrainMetrics) -> TrainingHistory:
        """Return the history with one more round of training."""
        devices = dict(self.devices)
        for name, one in metrics.devices.items():
            devices[name] = devices[name].merge(one) if name in devices else one
        losses = self.losses if metrics.loss is None else (*self.losses, metrics.loss)
        return TrainingHistory(devices=devices, losses=losses, spent=metrics.epsilon)

    def after_evaluation(self, metrics: ValidationMetrics) -> TrainingHistory:
        """Return the history with one more evaluation."""
        return replace(self, spent=largest([self.spent, metrics.epsilon]))

    def events(self, name: str) -> int:
        """Return the largest reported number of ledger entries that the device's rounds can have written."""
        return self.devices[name].events if name in self.devices else 0
