"""Connected devices: their nodes and latest reports."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Protocol, runtime_checkable

from flwr.app import Message

from protocol.messages import DeviceReport
from strategies.round.validation import MAX_REPORTED, MIN_REPORTED

log = logging.getLogger(__name__)

_MAX_WATTS = 10_000.0  # more than any single device uses
_MIN_EXAMPLES_PER_SECOND = 1e-4  # below it, a round takes days
_RETRY_SECONDS = 600.0  # before a rejected node is queried again


@runtime_checkable
class RegisteredGrid(Protocol):
    """Grid that knows the registered device of each node (`server.grid.validating_grid.ValidatingGrid`)."""

    def names(self) -> Mapping[int, str]:
        """Return the registered names of nodes; each name belongs to a key, and other nodes are missing."""
        ...

    def query_nodes(self, messages: Iterable[Message], *, timeout: float, wait: float) -> Iterator[Message]:
        """Send queries and yield replies; a reply may also be yielded by a later call.

        Args:
            messages: at most one query per node.
            timeout: maximum seconds for an answer.
            wait: seconds to wait after sending a query.
        """
        ...


class ConnectedDevices:
    """Connected devices with the base of the run.

    A name belongs to the node that was registered under it. Without a registry (a simulation, or a server without keys)
    it belongs to the first node that uses it, while that node is connected.

    Attributes:
        reports: reports of the connected devices, by node.
        stale: nodes among them whose report is too old to use, until they send a new one.
    """

    def __init__(self, base: str) -> None:
        self.reports: dict[int, DeviceReport] = {}
        self._base = base
        self.stale: set[int] = set()
        self._nodes: dict[str, int] = {}  # by device name
        self._rejected_at: dict[int, float] = {}  # time of rejection, by node
        self._reported_at: dict[int, float] = {}  # time of the latest report, by node

    def nodes_to_query(self, present: Collection[int], *, now: float = 0.0) -> list[int]:
        """Return the connected nodes without a current report, and drop the reports of disconnected nodes."""
        self._rejected_at = {
            node: when for node, when in self._rejected_at.items() if node in present and now < when + _RETRY_SECONDS
        }
        if not self.reports.keys() <= set(present):
            gone = sorted(report.device for node, report in self.reports.items() if node not in present)
            log.info("%s disconnected, %d connected", ", ".join(gone), len(self.reports) - len(gone))
            # A device may have reconnected under another node id that was rejected because its name was in use.
            self.reports = {node: report for node, report in self.reports.items() if node in present}
            self._reported_at = {node: time for node, time in self._reported_at.items() if node in present}
            self._nodes = nodes_by_name(self.reports)
            self.stale &= self.reports.keys()
            self._rejected_at.clear()
        current = (self.reports.keys() - self.stale) | self._rejected_at.keys()
        return [node for node in sorted(present) if node not in current]

    def mark_stale(self, *, before: float, exclude: Collection[int] = ()) -> None:
        """Mark reports older than the given time as stale.

        Args:
            before: time in seconds.
            exclude: nodes that must not be queried, e.g. since they are training.
        """
        self.stale |= {node for node in self.reports if self._reported_at[node] < before and node not in exclude}

    def update_report(self, node: int, report: DeviceReport, *, now: float, registered: str | None = None) -> None:
        """Add or update the report of a device, or reject it with a log message.

        Args:
            node: node that sent the report.
            report: its report.
            now: time in seconds.
            registered: name that the node's key was registered under; None: unknown.
        """
        known_name = self.reports.get(node, report).device
        numbers = report.examples_per_second, report.watts, report.uplink_mbps, report.downlink_mbps, report.memory_gib
        if report.base != self._base:
            reason = f"holds base {report.base[:12]}, the run uses {self._base[:12]}"
        elif registered is not None and report.device != registered:
            reason = f"its key was registered as {registered!r}"
        elif self._nodes.get(report.device, node) != node:
            reason = "its name is in use"
        elif report.device != known_name:
            reason = f"it was {known_name!r} before"
        elif report.rank is not None and report.rank < 1:
            reason = "its report asks for a rank below 1"
        elif not (report.device and all(MIN_REPORTED < number < MAX_REPORTED for number in numbers)):
            reason = "its report has no name, or an invalid speed, power or memory"
        elif report.watts > _MAX_WATTS or report.examples_per_second < _MIN_EXAMPLES_PER_SECOND:
            reason = f"it reports {report.watts:g} W and {report.examples_per_second:g} examples per second"
        else:
            if node not in self.reports:
                log.info(
                    "%s connected: %s, %g GiB, %d connected",
                    report.device,
                    report.profile,
                    report.memory_gib,
                    len(self.reports) + 1,
                )
            self.reports[node], self._reported_at[node] = report, now
            self._nodes[report.device] = node
            self.stale.discard(node)
            return
        if node not in self.reports:  # otherwise its earlier report remains, marked as stale
            self._rejected_at[node] = now
        log.warning("node %d, which reports the name %r, is rejected: %s", node, report.device[:100], reason)


def nodes_by_name(reports: Mapping[int, DeviceReport]) -> dict[str, int]:
    """Return the node of each device name."""
    return {report.device: node for node, report in reports.items()}
