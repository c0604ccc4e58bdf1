"""Which devices are there: by the node that each is at now, with the report that it gave last."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Protocol, runtime_checkable

from flwr.app import Message

from protocol.messages import DeviceReport
from strategies.round.validation import LEAST, MOST

log = logging.getLogger(__name__)

_WATTS = 10_000.0  # more than any one device takes
_SLOWEST = 1e-4  # examples a second: with fewer, a round takes days
_AGAIN = 600.0  # seconds after which a node that was refused is asked once more who it is


@runtime_checkable
class RegisteredGrid(Protocol):
    """A grid that knows which device each node was registered as (`server.grid.validating_grid.ValidatingGrid`)."""

    def names(self) -> Mapping[int, str]:
        """Names that nodes were registered under, each of which belongs to a key; of other nodes nothing is known."""
        ...

    def query_nodes(self, messages: Iterable[Message], *, timeout: float, wait: float) -> Iterator[Message]:
        """Answers to questions, each of which may also come with a later call."""
        ...


class ConnectedDevices:
    """The devices that are there and hold this base.

    A name belongs to the node that was registered under it; where no register is kept (a simulation, or a server
    without keys), to the node that came with it first, for as long as that is there.

    Attributes:
        reports: of those that are there, by node.
        stale: the nodes among them whose report is too old to go by, until they give another.
    """

    def __init__(self, base: str) -> None:
        self.reports: dict[int, DeviceReport] = {}
        self._base = base
        self.stale: set[int] = set()
        self._nodes: dict[str, int] = {}  # of each name in the reports
        self._unfit: dict[int, float] = {}  # when each was refused
        self._heard: dict[int, float] = {}  # when each report came

    def nodes_to_query(self, present: Collection[int], *, now: float = 0.0) -> list[int]:
        """The nodes among those present that have yet to say who they are, or how; whoever left is forgotten."""
        self._unfit = {node: when for node, when in self._unfit.items() if node in present and now < when + _AGAIN}
        if not self.reports.keys() <= set(present):
            gone = sorted(report.device for node, report in self.reports.items() if node not in present)
            log.info("%s left, %d are in", ", ".join(gone), len(self.reports) - len(gone))
            # Whoever left may be back under another node id, refused so far because its name was taken.
            self.reports = {node: report for node, report in self.reports.items() if node in present}
            self._heard = {node: time for node, time in self._heard.items() if node in present}
            self._nodes = nodes_by_name(self.reports)
            self.stale &= self.reports.keys()
            self._unfit.clear()
        known = (self.reports.keys() - self.stale) | self._unfit.keys()
        return [node for node in sorted(present) if node not in known]

    def mark_stale(self, *, before: float, but: Collection[int] = ()) -> None:
        """Whoever told of itself before this time is to do so again: its report may be wrong by now.

        Args:
            but: nodes that nobody looks at, and that are not to be disturbed.
        """
        self.stale |= {node for node in self.reports if self._heard[node] < before and node not in but}

    def update_report(self, node: int, report: DeviceReport, *, now: float, registered: str | None = None) -> None:
        """Take a device in, or what it tells anew, or say why not.

        Args:
            now: in seconds.
            registered: the name that the node's key was registered under; None: nobody knows.
        """
        named = self.reports.get(node, report).device
        costs = report.examples_per_second, report.watts, report.uplink_mbps, report.downlink_mbps, report.memory_gib
        if report.base != self._base:
            unfit = f"holds base {report.base[:12]}, the run uses {self._base[:12]}"
        elif registered is not None and report.device != registered:
            unfit = f"its key was registered as {registered!r}"
        elif self._nodes.get(report.device, node) != node:
            unfit = "its name is taken"
        elif report.device != named:
            unfit = f"it was {named!r} before"
        elif report.rank is not None and report.rank < 1:
            unfit = "its report asks for a rank below 1"
        elif not (report.device and all(LEAST < cost < MOST for cost in costs)):
            unfit = "its report has no name, or no sensible speed, power or memory"
        elif report.watts > _WATTS or report.examples_per_second < _SLOWEST:
            unfit = f"it tells of {report.watts:g} W and {report.examples_per_second:g} examples a second"
        else:
            if node not in self.reports:
                log.info(
                    "%s is in: %s, %g GiB, %d in all",
                    report.device,
                    report.profile,
                    report.memory_gib,
                    len(self.reports) + 1,
                )
            self.reports[node], self._heard[node] = report, now
            self._nodes[report.device] = node
            self.stale.discard(node)
            return
        if node not in self.reports:  # else its old report stays, stale
            self._unfit[node] = now
        log.warning("node %d, which calls itself %r, is not asked: %s", node, report.device[:100], unfit)


def nodes_by_name(reports: Mapping[int, DeviceReport]) -> dict[str, int]:
    """The node of each device."""
    return {report.device: node for node, report in reports.items()}
