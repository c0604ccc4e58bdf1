"""Devices of a run: their reports, the candidates of a round, and the selection among them."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from flwr.serverapp import Grid

from common.seeding import derive_seed
from models.lora.adapter import Adapter
from protocol import records
from protocol.messages import DeviceReport, Query, TrainingPlan
from strategies.clock import Clock
from strategies.planning.planner import Planner
from strategies.round.connected_devices import ConnectedDevices, RegisteredGrid
from strategies.round.history import TrainingHistory
from strategies.round.messages import received_replies, to_messages
from strategies.round.validation import validate_replies
from strategies.selection import DeviceCandidate, DeviceCandidates, Selection, uses_transient_state
from strategies.selection.eligible import ALL_DEVICES, Eligibility

_QUERY_TIMEOUT = 120.0  # seconds; a device starts a process to reply
_QUERY_WAIT = 5.0  # seconds to wait for the reports of new devices, which may also arrive later
_QUERY_STALE = 30.0  # seconds to wait for the current state of connected devices, if it matters


@dataclass(frozen=True, kw_only=True)
class CohortRule:
    """How the devices of a round are chosen."""

    selection: Selection
    """Selects the devices that train in a round."""
    eligibility: Eligibility = ALL_DEVICES
    """Requirements for training. Under device-level privacy, ineligible devices are still sampled and charged, but not
    contacted and not replaced: replacing them would leak their state into the selection of this and later rounds."""
    max_state_age: float = math.inf
    """Seconds after which a report is requested again, if anything uses transient device state."""


class Cohort:
    """Choose the devices of each round among those that are connected.

    Args:
        rule: how devices are chosen.
        planner: plan of each device.
        run: name of the run.
        base: hash of the run's base.
        clock: clock that determines the age of reports.
        adapted: names of the sites, if they differ from those that the base's family adapts; None: they don't.
        device_level: whether the run has device-level privacy.

    Attributes:
        devices: connected devices.
    """

    def __init__(
        self,
        rule: CohortRule,
        planner: Planner,
        *,
        run: str,
        base: str,
        clock: Clock,
        adapted: tuple[str, ...] | None,
        device_level: bool,
    ) -> None:
        self.rule, self.planner, self._run, self._clock = rule, planner, run, clock
        self._adapted, self._device_level = adapted, device_level
        self.devices = ConnectedDevices(base)

    def query(self, grid: Grid) -> dict[int, DeviceReport]:
        """Return the reports of connected nodes with the base of the run; only nodes without a report are queried.

        Under device-level privacy, devices with a stale report that do not reply keep it: otherwise other devices would
        be sampled.
        """
        if nodes := self.devices.nodes_to_query(set(grid.get_node_ids()), now=self._clock.now()):
            messages = to_messages(dict.fromkeys(nodes, Query(adapted=self._adapted)))
            names: Mapping[int, str] = {}
            if isinstance(grid, RegisteredGrid):
                names = grid.names()
                wait = _QUERY_STALE if self.devices.stale else _QUERY_WAIT
                replies = grid.query_nodes(messages, timeout=_QUERY_TIMEOUT, wait=wait)
            else:
                replies = iter(grid.send_and_receive(messages, timeout=_QUERY_TIMEOUT))
            received = received_replies(records.QUERY, replies)
            answered, _ = validate_replies(records.QUERY, received, dict.fromkeys(nodes), lambda _, reply: reply)
            for node, report in sorted(answered.items()):
                self.devices.update_report(node, report, now=self._clock.now(), registered=names.get(node))
        reports, stale = self.devices.reports, () if self._device_level else self.devices.stale
        return {node: report for node, report in reports.items() if node not in stale}

    def current_reports(self, grid: Grid, *, busy: Collection[int] = ()) -> dict[int, DeviceReport]:
        """Query like `query`, including reports that are too old if transient device state is used.

        Args:
            grid: connection to the devices.
            busy: nodes that are left out, and not disturbed.
        """
        rule = self.rule
        if (
            rule.eligibility.uses_transient_state
            or self.planner.limits.uses_transient_state
            or uses_transient_state(rule.selection)
        ):
            self.devices.mark_stale(before=self._clock.now() - rule.max_state_age, exclude=busy)
        return {node: report for node, report in self.query(grid).items() if node not in busy}

    def candidates(
        self,
        reports: Mapping[int, DeviceReport],
        full: TrainingPlan,
        history: TrainingHistory,
        *,
        adapter: Adapter,
        download: int,
        round: int,
    ) -> DeviceCandidates:
        """Return the devices with a feasible plan, and the plan that each would get.

        Under device-level privacy, other devices are included, with the plan of a device without limits.

        Args:
            reports: reports by node.
            full: plan of a device without limits.
            history: record of the devices.
            adapter: adapter that is sent.
            download: its bytes.
            round: number of the round.
        """
        plans = self.planner.plans(reports.values(), full, adapter=adapter, download=download)
        candidates = {}
        for node, report in reports.items():
            feasible = planned = plans.get(report.device)
            if self._device_level and not feasible:
                planned = self.planner.at_every_site(report, full, adapter=adapter, download=download)
            if planned:
                ready = node not in self.devices.stale and self.rule.eligibility(report)
                candidates[report.device] = DeviceCandidate(
                    report=report,
                    plan=planned.plan,
                    seconds=planned.seconds,
                    joules=planned.joules,
                    ready=feasible is not None and ready,
                    metrics=history.devices.get(report.device),
                )
        return DeviceCandidates(candidates, history.losses, round=round)

    def select(self, candidates: DeviceCandidates, *, draw: int, limit: int | None = None) -> list[DeviceCandidate]:
        """Select the devices that train.

        Under device-level privacy these may include devices that can't be asked: replacing them, now or later, would
        leak their state.

        Args:
            candidates: devices with a plan.
            draw: number of the random stream.
            limit: maximum number of devices; None: all that are selected.
        """
        ready = {name: one for name, one in candidates.items() if one.ready}
        available = DeviceCandidates(ready, candidates.losses, round=candidates.round)
        selected = self.rule.selection.select(candidates if self._device_level else available, draw=draw)
        if limit is not None and len(selected) > limit:
            # "room" seeds the subsample; don't change.
            selected = sorted(random.Random(derive_seed(self._run, draw, "room")).sample(selected, limit))
        return [candidates[name] for name in selected]
