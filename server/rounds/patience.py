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
from strategies.strategy import Federated

log = logging.getLogger(__name__)

_SHORT, _LONG = 30.0, 600.0  # seconds before a round is tried again, first and at most


def wait_for_devices(
    grid: Grid, strategy: Federated, present: int, clock: Clock, timeout: float, *, wait_forever: bool
) -> None:
    """Wait until enough devices are connected that hold the run's base and have pictures.

    The connected devices are logged whenever they change, and every `timeout` seconds.

    Args:
        waits: whether to wait without limit.

    Raises:
        AntherError: too few devices are connected after `timeout` seconds, and `wait_forever` is false.
    """
    until = clock.now() + timeout
    told: str | None = None
    while len(found := _able(strategy.query(grid))) < present:
        over = clock.now() >= until
        short = f"{len(found)} of {present} devices are there"
        if over and not wait_forever:
            raise AntherError(
                f"{short} after {timeout:g} s: check that they are connected and hold the base of this run"
            )
        line = f"{short}{': ' if found else ''}{', '.join(found)}; waiting for {present - len(found)} more"
        if wait_forever and (over or line != told):
            log.warning("%s that hold this run's base and have pictures (server.min_devices, cohort.size)", line)
            told, until = line, clock.now() + timeout
        clock.wait(until)


def _able(reports: Mapping[int, DeviceReport]) -> list[str]:
    """Return names of the devices that have pictures; under a privacy guarantee, every device reports that it has."""
    return sorted(report.device for report in reports.values() if report.pictures)


@dataclass
class RoundRetries:
    """Retry policy for failed rounds.

    Args:
        hours: time without a good round after which the run stops, unfinished.
    """

    clock: Clock
    hours: float
    _since: float | None = None
    _tries: int = 0
    _reasons: dict[str, int] = field(default_factory=dict)

    def again(self, number: int, train: TrainMetrics | None, *, needed: int) -> None:
        """Wait before retrying a round that had too few good replies.

        Raises:
            AntherError: there was no good round for `hours`.
        """
        now = self.clock.now()
        self._since = now if self._since is None else self._since
        self._tries += 1
        for reason, count in train.dropped.items() if train else ():
            self._reasons[reason] = self._reasons.get(reason, 0) + count
        why = ", ".join(f"{count} {reason}" for reason, count in sorted(self._reasons.items())) or "nobody to ask"
        if now - self._since >= self.hours * HOUR:
            raise AntherError(
                f"round {number} had no {needed} good replies in {self._tries} tries over {self.hours:g} hours ({why})."
                " The run stops, unfinished: look at its devices' logs, and start the server again to go on"
            )
        pause = min(_LONG, _SHORT * 2 ** min(self._tries - 1, 10))
        log.warning(
            "round %d: %s (%s), %d needed: it doesn't count, and is tried again in %.0f s",
            number,
            f"{train.replied} good replies of {train.asked}" if train else "no replies",
            why,
            needed,
            pause,
        )
        until = now + pause
        while self.clock.now() < until:
            self.clock.wait(until)

    def done(self) -> None:
        """Note that a round was good."""
        self._since, self._tries, self._reasons = None, 0, {}
