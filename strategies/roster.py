"""Which devices are there: by the node that each is at now, with the report that it gave once."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

from protocol.messages import DeviceReport
from strategies.replies import LEAST, MOST
from strategies.selection import Selection

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

    def unknown(self, present: Collection[int]) -> list[int]:
        """The nodes among those present that have yet to say who they are; whoever left is forgotten."""
        if not self.reports.keys() <= set(present):
            # Whoever left may be back under another node id, refused so far because its name was taken.
            self.reports = {node: report for node, report in self.reports.items() if node in present}
            self._names = {report.device for report in self.reports.values()}
            self._unfit.clear()
        return [node for node in sorted(present) if node not in self.reports and node not in self._unfit]

    def consider(self, node: int, report: DeviceReport) -> None:
        """Take a new device in, or remember why not."""
        speeds = (report.examples_per_second, report.uplink_mbps, report.downlink_mbps)
        if report.base != self._base:
            self._unfit[node] = f"holds base {report.base[:12]}, the run uses {self._base[:12]}"
        elif report.device in self._names:
            self._unfit[node] = "its name is taken"
        elif not (report.device and all(LEAST < speed < MOST for speed in speeds)):
            self._unfit[node] = "its report has no name or no sensible speed"
        else:
            self.reports[node] = report
            self._names.add(report.device)
            return
        log.warning("device %r is not asked: %s", report.device[:100], self._unfit[node])


def selected(selection: Selection, reports: Mapping[int, DeviceReport], round: int) -> dict[int, DeviceReport]:
    """The nodes that a selection of their devices' names picks, in the order of those names."""
    nodes = {report.device: node for node, report in reports.items()}
    return {nodes[name]: reports[nodes[name]] for name in selection.select(nodes, round=round)}
