"""Which devices are there: by the node that each is at now, with the report that it gave last."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

from protocol.messages import DeviceReport
from strategies.replies import LEAST, MOST

log = logging.getLogger(__name__)


class Roster:
    """The devices that are there and hold this base.

    Attributes:
        reports: of those that can be asked, by node.
    """

    def __init__(self, base: str) -> None:
        self.reports: dict[int, DeviceReport] = {}
        self._base = base
        self._names: set[str] = set()  # of the reports
        self._unfit: dict[int, str] = {}
        self._heard: dict[int, float] = {}  # when each report came

    def unknown(self, present: Collection[int]) -> list[int]:
        """The nodes among those present that have yet to say who they are; whoever left is forgotten."""
        if not self.reports.keys() <= set(present):
            # Whoever left may be back under another node id, refused so far because its name was taken.
            self.reports = {node: report for node, report in self.reports.items() if node in present}
            self._names = {report.device for report in self.reports.values()}
            self._heard = {node: time for node, time in self._heard.items() if node in present}
            self._unfit.clear()
        return [node for node in sorted(present) if node not in self.reports and node not in self._unfit]

    def forget(self, *, before: float, but: Collection[int] = ()) -> None:
        """Whoever told of itself before this time is unknown again: its report may be wrong by now.

        Args:
            but: nodes that nobody looks at, and that are not to be disturbed.
        """
        for node in [node for node in self.reports if self._heard[node] < before and node not in but]:
            self._names.remove(self.reports.pop(node).device)
            del self._heard[node]

    def consider(self, node: int, report: DeviceReport, *, now: float) -> None:
        """Take a new device in, or remember why not."""
        costs = (report.examples_per_second, report.watts, report.uplink_mbps, report.downlink_mbps)
        if report.base != self._base:
            self._unfit[node] = f"holds base {report.base[:12]}, the run uses {self._base[:12]}"
        elif report.device in self._names:
            self._unfit[node] = "its name is taken"
        elif report.rank is not None and report.rank < 1:
            self._unfit[node] = "its report asks for a rank below 1"
        elif not (report.device and all(LEAST < cost < MOST for cost in costs)):
            self._unfit[node] = "its report has no name, or no sensible speed or power"
        else:
            self.reports[node] = report
            self._names.add(report.device)
            self._heard[node] = now
            return
        log.warning("device %r is not asked: %s", report.device[:100], self._unfit[node])


def by_name(reports: Mapping[int, DeviceReport]) -> dict[str, int]:
    """The node of each device."""
    return {report.device: node for node, report in reports.items()}
