"""Planning method of a configuration."""

from __future__ import annotations

from typing import cast

from conf.schemas.federation import FederationConfig
from models.base.base import Base
from strategies.factory.personalization import build_personalization
from strategies.planning import PLANNINGS, PlanningMethod
from training.personalization import held_bytes


def build_planning(config: FederationConfig, base: Base | None, memory_factor: float) -> PlanningMethod:
    """Build the method of `planning`.

    Args:
        config: configuration of the run.
        base: its base.
        memory_factor: factor on the predicted memory of a pass.
    """
    method = build_personalization(config)
    message_rank = method.message_rank(config.adapter.shared.rank)
    known = {
        "base": base,
        "rank": method.largest_rank(message_rank),
        "held_bytes": held_bytes(method, base.sites, message_rank) if base else 0,
        "memory_factor": memory_factor,
    }
    return cast(PlanningMethod, PLANNINGS.create(config.planning.name, known))
