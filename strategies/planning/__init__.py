"""Training plans that fit each device's memory, time and power.

A planning method decides at which sites a device trains, and for how many steps. Each module registers its method as
`@planning("name")`. The parameters `base`, `rank`, `memory_factor` and `held_bytes` of its constructor are filled in
from the run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from common.plugins import Registry
from models.lora.adapter import Adapter, Sites
from protocol.messages import DeviceReport, TrainingPlan
from strategies.planning.plan import PlanLimits

PLANNINGS: Registry[Any] = Registry("planning", key="planning", modules=__name__)
planning = PLANNINGS.register


class SentAdapter(NamedTuple):
    """Adapter that the devices of a round are sent, and the limits of their plans."""

    adapter: Adapter
    sites: Sites
    """All sites of the adapter."""
    download: int
    """Bytes of the encoded adapter."""
    limits: PlanLimits


class SitesAndSteps(NamedTuple):
    """Plan of a device with its sites and steps."""

    plan: TrainingPlan
    work: float
    """Time of a step, as a fraction of a step that trains every site."""


DevicePlanner = Callable[[DeviceReport, TrainingPlan], SitesAndSteps | None]
"""Function of a device's report and its largest plan, which has the rank, the sites and the precision of the device;
None if no plan is feasible."""


class PlanningMethod(Protocol):
    """Choice of the sites and steps of each device."""

    @property
    def every_site(self) -> bool:
        """Whether each device trains every site of its largest plan."""
        ...

    def in_round(self, sent: SentAdapter, /) -> DevicePlanner:
        """Return the planner of a round, which is called once for each kind of device."""
        ...
