"""Wait while too few devices of a real federation can train, log which are missing, and finally stop with a reason."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from flwr.serverapp import Grid

from common.errors import AntherError
from common.units import HOUR
from protocol.messages import DeviceReport
from strategies.clock import Clock
from strategies.round.metrics import TrainMetrics
from strategies.strategy import FederatedStrategy

log = logging.getLogger(__name__)

_SHORT, _LONG = 30.0, 600.0  # seconds before the first retry of a round, and the maximum


def wait_for_devices(
    grid: Grid, strategy: FederatedStrategy, min_devices: int, clock: Clock, timeout: float, *, wait_forever: bool
) -> None:
    """Wait until enough devices with the run's base and with pictures are connected.

    The connected devices are logged whenever they change, and every `timeout` seconds.

    Args:
        grid: connection to the devices.
        strategy: queries the devices.
        min_devices: number of devices to wait for.
        clock: clock of the time limit.
        timeout: seconds.
        wait_forever: whether to wait without limit.

    Raises:
        AntherError: too few devices are connected after `timeout` seconds, and `wait_forever` is false.
    """
    until = clock.now() + timeout
    logged: str | None = None
    while len(names := _with_pictures(strategy.query(grid))) < min_devices:
        expired = clock.now() >= until
        short = f"{len(names)} of {min_devices} devices are connected"
        if expired and not wait_forever:
            raise AntherError(
                f"{short} after {timeout:g} s: check that they are connected and have the base of this run"
            )
        line = f"{short}{': ' if names else ''}{', '.join(names)}; waiting for {min_devices - len(names)} more"
        if wait_forever and (expired or line != logged):
            log.warning("%s with this run's base and with pictures (server.min_devices, cohort.size)", line)
            logged, until = line, clock.now() + timeout
        clock.wait(until)


def _with_pictures(reports: Mapping[int, DeviceReport]) -> list[str]:
    """Return names of the devices that have pictures; under a privacy guarantee, every device reports that it has."""
    return sorted(report.device for report in reports.values() if report.pictures)


@dataclass
class RoundRetries:
    """Retry policy for failed rounds.

    Args:
        hours: time without a successful round after which the run stops, unfinished.
    """

    clock: Clock
    hours: float
    _since: float | None = None
    _tries: int = 0
    _reasons: dict[str, int] = field(default_factory=dict)

    def wait(self, number: int, train: TrainMetrics | None, *, quorum: int) -> None:
        """Wait before retrying a round that had too few accepted replies.

        Args:
            number: number of the round.
            train: metrics of the failed attempt.
            quorum: number of accepted replies that the round needs.

        Raises:
            AntherError: there was no successful round for `hours`.
        """
        now = self.clock.now()
        self._since = now if self._since is None else self._since
        self._tries += 1
        for reason, count in train.dropped.items() if train else ():
            self._reasons[reason] = self._reasons.get(reason, 0) + count
        reasons = (
            ", ".join(f"{count} {reason}" for reason, count in sorted(self._reasons.items())) or "no device to ask"
        )
        if now - self._since >= self.hours * HOUR:
            raise AntherError(
                f"round {number} had fewer than {quorum} accepted replies in {self._tries} tries over {self.hours:g} "
                f"hours ({reasons}). The run stops unfinished: check the devices' logs, and start the server again to "
                "continue"
            )
        pause = min(_LONG, _SHORT * 2 ** min(self._tries - 1, 10))
        log.warning(
            "round %d: %s (%s), %d needed: it doesn't count; retrying in %.0f s",
            number,
            f"{train.replied} accepted replies of {train.asked}" if train else "no replies",
            reasons,
            quorum,
            pause,
        )
        until = now + pause
        while self.clock.now() < until:
            self.clock.wait(until)

    def reset(self) -> None:
        """Reset the failures after a successful round."""
        self._since, self._tries, self._reasons = None, 0, {}
