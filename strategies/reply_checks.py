"""Checks of replies that depend on the run, beyond their validity."""

from __future__ import annotations

from dataclasses import dataclass

from strategies.robust.replay import ReplayFilter


@dataclass(frozen=True, kw_only=True)
class ReplyChecks:
    """Which valid replies are accepted."""

    accept_simulated: bool = False
    """Also accept private updates with reproducible noise, which are no releases; for tests and simulations only."""
    replay_filter: ReplayFilter | None = None
    """Rejects updates that were sent in earlier rounds; None: no check."""
