"""Aggregation whose last round belongs to a method of personalization."""

from __future__ import annotations

from collections.abc import Collection
from copy import copy

from models.lora.adapter import Adapter, Factors, rank
from strategies.aggregation import Aggregated, Aggregation, RankAware, Updates, check_updates, declared_linearity
from training.personalization import Personalization


class LastRound:
    """Aggregate by a rule in all rounds but the last, in which devices train B only and the method gets every update.

    Args:
        aggregation: rule of the other rounds.
        method: computes the adapter after the last round.
        rounds: number of the last round.
    """

    def __init__(self, aggregation: Aggregation, method: Personalization, *, rounds: int) -> None:
        self.mixed_ranks, self.stable_factors = aggregation.mixed_ranks, aggregation.stable_factors
        self.sensitivity = declared_linearity(aggregation)
        self.aggregation, self.method, self.rounds = aggregation, method, rounds

    def steps(self, round: int) -> int | None:
        """Return the local steps of the last round; None for the other rounds, which have those of the plan."""
        return self.method.last_round_steps if round == self.rounds else None

    def trains(self, round: int, /) -> str:
        """Return B for the last round, and otherwise the part that the rule trains."""
        return "b" if round == self.rounds else self.aggregation.trains(round)

    def with_ranks(self, ranks: Collection[int]) -> LastRound:
        """See `strategies.aggregation.RankAware.with_ranks`; has no effect unless the aggregation is rank-aware."""
        ranked = copy(self)
        if isinstance(self.aggregation, RankAware):
            ranked.aggregation = self.aggregation.with_ranks(ranks)
        return ranked

    def aggregate(self, current: Adapter, updates: Updates, *, round: int) -> Aggregated:
        """Aggregate; in the last round directions and sites that a device didn't train count with their current B."""
        if round != self.rounds:
            return self.aggregation.aggregate(current, updates, round=round)
        check_updates(updates)
        completed = [_completed(current, adapter) for adapter, _ in updates]
        return Aggregated(self.method.after_last_round(current, completed), {"rank": float(rank(current))})


def _completed(current: Adapter, trained: Adapter) -> Adapter:
    """Return an update at all sites and of full rank.

    Args:
        current: A [r, in] and B [out, r] per site.
        trained: the first directions of some of the sites.
    """
    whole = dict(current)
    for site, (_, b) in trained.items():
        whole[site] = Factors(current[site].a, current[site].b.clone())
        whole[site].b[:, : b.shape[1]] = b
    return whole
