"""State before a round, the requests that it sends, and its result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from models.lora.adapter import Adapter
from protocol.messages import DeviceReport, Evaluate, Personalize, Train, TrainingPlan
from strategies.round.history import TrainingHistory
from strategies.round.metrics import CentralDPMetrics, TrainMetrics
from strategies.round.updates import RoundUpdates
from strategies.scaffold import ControlUpdate
from strategies.server_optimizers import StrategyState


@dataclass(frozen=True, kw_only=True)
class RoundStart:
    """State before a round: the result of all earlier rounds."""

    number: int
    """1 for the first round of training."""
    adapter: Adapter
    """As decoded from a payload."""
    memory: StrategyState = field(default_factory=dict)
    """State that the strategy keeps across rounds besides the adapter."""
    history: TrainingHistory = field(default_factory=TrainingHistory)
    release: CentralDPMetrics | None = None
    """Latest release under device-level privacy, which determines the clip of this round; None before any."""


@dataclass(frozen=True, kw_only=True)
class RoundRequest:
    """Training requests of a round, and what their replies are validated against."""

    adapter: Adapter
    """Adapter that was sent, as decoded by the devices."""
    messages: Mapping[int, Train]
    """By node."""
    plans: Mapping[int, tuple[DeviceReport, TrainingPlan]]
    """Report and plan of each device, by node."""
    not_contacted: tuple[str, ...] = ()
    """Names of the selected devices that could not be contacted. Under device-level privacy they count as asked."""
    bytes_down: int
    control_update: ControlUpdate | None
    """Update of the server's control variate; None without SCAFFOLD."""
    residual: Mapping[str, Tensor]
    """Quantization residual of the adapter that was sent, to be added to the next one."""
    sent_at: float | None = None
    """Time of sending on the strategy's clock; None if devices' seconds are not those of that clock."""
    eligible: frozenset[int] = frozenset()
    """Nodes that could have been asked."""
    updates: RoundUpdates | None = None
    """With disk space reserved for all updates, under device-level privacy."""


@dataclass(frozen=True, kw_only=True)
class RoundResult:
    """Result of a round of training."""

    adapter: Adapter | None
    """The next adapter; None: the round keeps the current one."""
    memory: StrategyState
    metrics: TrainMetrics


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """Requests to evaluate the adapter of a round."""

    number: int
    """Number of the round."""
    messages: Mapping[int, Evaluate]
    """By node."""
    asked: Mapping[int, DeviceReport]
    """Report of each device, by node."""
    max_epsilon: float | None
    """ε per picture that the plans of this run explain so far; None without example-level privacy."""


@dataclass(frozen=True, kw_only=True)
class PersonalizationRequest:
    """Requests to train personal adapters."""

    messages: Mapping[int, Personalize]
    """By node."""
    asked: Mapping[int, DeviceReport]
    """Report of each device, by node."""
    plan: TrainingPlan
    """Plan of the training, which determines its plausible cost."""
    sent_at: float | None
    """As in `RoundRequest`."""
