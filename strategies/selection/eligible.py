"""Who may be asked at all: after production federated learning, idle, charging and on an unmetered link (Bonawitz et
al., 2019, arXiv:1902.01046, §2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from protocol.messages import DeviceReport


@dataclass(frozen=True, kw_only=True)
class Eligibility:
    """What must hold of a device; by default nothing."""

    idle: bool = False
    """Nobody uses it."""
    battery: float | None = None
    """Share of a full battery that it must have, or charge; None: it may be empty."""
    cool: bool = False
    unmetered: bool = False
    pictures: bool = False
    """It has some to train on."""
    memory_gib: float | None = None
    """That it has at least; None: any."""

    @property
    def uses_transient_state(self) -> bool:
        """Whether anything is asked for that may have changed since a device told of it."""
        return self != Eligibility(memory_gib=self.memory_gib)

    def __call__(self, report: DeviceReport) -> bool:
        return next(self.against(report), None) is None

    def against(self, report: DeviceReport) -> Iterator[str]:
        """What of it does not hold, in a word each."""
        if self.idle and report.busy:
            yield "busy"
        low = self.battery is not None and report.battery is not None and report.battery < self.battery
        if low and not report.charging:
            yield "battery"
        if self.cool and report.hot:
            yield "hot"
        if self.unmetered and report.metered:
            yield "metered"
        if self.pictures and not report.pictures:
            yield "no pictures"
        if self.memory_gib is not None and report.memory_gib < self.memory_gib:
            yield "memory"


ALL_DEVICES = Eligibility()
