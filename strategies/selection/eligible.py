"""Eligibility of devices for training: idle, charging and on an unmetered link, as in production federated learning.

References:
    Bonawitz et al., "Towards Federated Learning at Scale: System Design", 2019, arXiv:1902.01046, §2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from protocol.messages import DeviceReport


@dataclass(frozen=True, kw_only=True)
class Eligibility:
    """Requirements for a device; none by default."""

    idle: bool = False
    """Require that the device isn't in use."""
    battery: float | None = None
    """Minimum battery charge, as a fraction, of a device that isn't charging; None: any."""
    cool: bool = False
    """Require that the device isn't hot."""
    unmetered: bool = False
    """Require a link that isn't metered."""
    pictures: bool = False
    """Require pictures on the device."""
    memory_gib: float | None = None
    """Minimum memory in GiB; None: any."""

    @property
    def uses_transient_state(self) -> bool:
        """Whether a requirement concerns state that may have changed since a device reported it."""
        return self != Eligibility(memory_gib=self.memory_gib)

    def __call__(self, report: DeviceReport) -> bool:
        return next(self.unmet(report), None) is None

    def unmet(self, report: DeviceReport) -> Iterator[str]:
        """Yield a short reason for each requirement that the device does not meet."""
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
