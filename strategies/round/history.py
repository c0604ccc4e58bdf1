"""What a run knows of its devices from the rounds that are over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from strategies.round.metrics import DeviceMetrics, TrainMetrics, largest


class History:
    """All rounds so far.

    Attributes:
        devices: what they took together, by the device's name.
        losses: that each of them ended with, where one was told.
        spent: the largest ε per picture that a device told of in any of them.
    """

    def __init__(self) -> None:
        self.devices: dict[str, DeviceMetrics] = {}
        self.losses: list[float] = []
        self.spent: float | None = None

    def remember(self, devices: Mapping[str, DeviceMetrics], rounds: Iterable[TrainMetrics | None]) -> None:
        """What a run that goes on knew: of its devices, and of its rounds."""
        for name, facts in devices.items():
            before = self.devices.get(name, facts)
            self.devices[name] = replace(facts, events=max(before.events, facts.events))
        self.losses = [facts.loss for facts in rounds if facts and facts.loss is not None]
        self.spent = largest(facts.epsilon for facts in self.devices.values())

    def add_round(self, facts: TrainMetrics) -> None:
        """One more round."""
        self.spent = facts.epsilon
        for name, one in facts.devices.items():
            before = self.devices.get(name)
            self.devices[name] = before.then(one) if before else one
        if facts.loss is not None:
            self.losses.append(facts.loss)

    def events(self, name: str) -> int:
        """Entries in a device's ledger, the most that it told of and its rounds can have written."""
        return self.devices[name].events if name in self.devices else 0
