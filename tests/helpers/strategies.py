"""Strategies of tests, from the settings of all parts by name."""

from __future__ import annotations

from typing import Any

from flwr.serverapp import Grid

from protocol.messages import TrainingPlan
from server.rounds.sync import RoundLimits, SyncRunner
from strategies.clock import Clock
from strategies.cohort import CohortRule
from strategies.download import AdapterFormat
from strategies.flower_strategy import FlowerStrategy
from strategies.phases.evaluation import EvaluationRule
from strategies.planning.planner import Planning
from strategies.reply_checks import ReplyChecks
from strategies.round.request import RoundResult, RoundStart
from strategies.server_update import ServerUpdate
from strategies.strategy import FederatedStrategy

_PARTS: dict[str, tuple[Any, dict[str, str]]] = {  # class of each part, and the names of its settings here
    "format": (
        AdapterFormat,
        {"sites": "sites", "adapted": "adapted", "lora_xs_bases": "lora_xs_bases", "download": "precision"},
    ),
    "update": (
        ServerUpdate,
        {name: name for name in ("aggregation", "server_optimizer", "central_dp", "quorum")},
    ),
    "cohort": (CohortRule, {name: name for name in ("selection", "eligibility", "max_state_age")}),
    "planning": (Planning, {name: name for name in ("limits", "method", "lr_schedule")}),
    "evaluation": (
        EvaluationRule,
        {"evaluation_policy": "policy", "evaluation_selection": "selection", "timesteps": "timesteps"},
    ),
    "checks": (ReplyChecks, {name: name for name in ("accept_simulated", "replay_filter")}),
}


def make_strategy(*, plan: TrainingPlan, clock: Clock | None = None, **settings: Any) -> FlowerStrategy:
    """Make a strategy.

    Args:
        plan: plan of a device without limits.
        clock: clock of the run; None: wall time.
        settings: settings of all parts, as named in `_PARTS`.
    """
    parts = {}
    for part, (kind, names) in _PARTS.items():
        parts[part] = kind(**{names[name]: settings.pop(name) for name in list(settings) if name in names})
    assert not settings, settings
    return FlowerStrategy(plan=plan, clock=clock, **parts)


def train_round(strategy: FederatedStrategy, grid: Grid, start: RoundStart) -> RoundResult:
    """Run the training of one round."""
    return SyncRunner(grid, strategy, RoundLimits()).train(start)
