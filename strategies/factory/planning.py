"""Planning method of a configuration."""

from __future__ import annotations

from typing import cast

from conf.schemas.federation import FederationConfig
from models.base.base import Base
from strategies.planning import PLANNINGS, PlanningMethod


def build_planning(config: FederationConfig, base: Base | None, memory_factor: float) -> PlanningMethod:
    """Build the method of `planning`.

    Args:
        config: configuration of the run.
        base: its base.
        memory_factor: factor on the predicted memory of a pass.
    """
    known = {"base": base, "rank": config.adapter.shared.rank, "memory_factor": memory_factor}
    return cast(PlanningMethod, PLANNINGS.create(config.planning.name, known))
