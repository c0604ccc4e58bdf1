"""Server's record of the devices of a run, from all finished rounds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from strategies.round.metrics import DeviceMetrics, TrainMetrics, largest


class TrainingHistory:
    """Totals over all rounds so far.

    Attributes:
        devices: totals of each device, by name.
        losses: training loss of each round that has one.
        spent: largest ε per picture that any device reported.
    """

    def __init__(self) -> None:
        self.devices: dict[str, DeviceMetrics] = {}
        self.losses: list[float] = []
        self.spent: float | None = None

    def restore(self, devices: Mapping[str, DeviceMetrics], rounds: Iterable[TrainMetrics | None]) -> None:
        """Restore the devices and rounds of a resumed run."""
        for name, metrics in devices.items():
            before = self.devices.get(name, metrics)
            self.devices[name] = replace(metrics, events=max(before.events, metrics.events))
        self.losses = [metrics.loss for metrics in rounds if metrics and metrics.loss is not None]
        self.spent = largest(metrics.epsilon for metrics in self.devices.values())

    def add_round(self, metrics: TrainMetrics) -> None:
        """Add one round."""
        self.spent = metrics.epsilon
        for name, one in metrics.devices.items():
            before = self.devices.get(name)
            self.devices[name] = before.merge(one) if before else one
        if metrics.loss is not None:
            self.losses.append(metrics.loss)

    def events(self, name: str) -> int:
        """Return the largest reported number of ledger entries that the device's rounds can have written."""
        return self.devices[name].events if name in self.devices else 0
