"""Aggregation with robust rules applied before it."""

from __future__ import annotations

from collections.abc import Collection
from copy import copy

from common.seeding import derive_seed
from models.lora.adapter import Adapter, Factors
from strategies.aggregation import (
    Aggregated,
    Aggregation,
    Linearity,
    RankAware,
    Updates,
    check_updates,
    declared_linearity,
)
from strategies.robust import EntrywiseRule, RobustRules, UpdateGeometry
from strategies.robust.gram import changes
from strategies.robust.trimmed import combine_updates


class RobustAggregation:
    """Apply robust rules to the changes of a round, one after the other, and aggregate the result.

    A change with scale s is passed on as two updates: the device's update with the fraction s of its weight, and an
    unchanged adapter with the rest. For a mean of products, such as `exact`, this equals the mean with s · C_k; for a
    mean of factors, such as `fedit`, each factor moves by the fraction s. The bound then applies to the contribution of
    a device to the mean of products, and no rule detects the error of a mean of rotated factors: use
    `exact` against attackers that may rotate them.

    Args:
        aggregation: rule that is applied last.
        rules: robust rules in their order.
        entrywise: combines the remaining updates into one, which the aggregation converts into its own form; None:
            each update is aggregated.
        rank: largest rank of the combined update; None: no limit.
        seed: seed of the random vectors that compress the combined update.
    """

    def __init__(
        self,
        aggregation: Aggregation,
        *,
        rules: RobustRules,
        entrywise: EntrywiseRule | None,
        rank: int | None,
        seed: int,
    ) -> None:
        self.mixed_ranks = aggregation.mixed_ranks
        self.sensitivity = declared_linearity(aggregation) if entrywise is None else ROTATED
        self.stable_factors = aggregation.stable_factors and entrywise is None
        self.trains = aggregation.trains
        self.aggregation, self.rules, self.entrywise = aggregation, rules, entrywise
        self._rank, self._seed = rank, seed

    def with_ranks(self, ranks: Collection[int]) -> RobustAggregation:
        """See `strategies.aggregation.RankAware.with_ranks`; has no effect unless the aggregation is rank-aware."""
        robust = copy(self)
        if isinstance(self.aggregation, RankAware):
            robust.aggregation = self.aggregation.with_ranks(ranks)
        return robust

    def aggregate(self, current: Adapter, updates: Updates, *, round: int) -> Aggregated:
        """Apply the rules and aggregate.

        Additional diagnostics: `left_out`, devices with zero weight; `held`, devices whose change was scaled down.
        """
        check_updates(updates)
        judged = changes(current, updates)
        for rule in self.rules:
            judged = rule.reweight(judged)
        active = judged.active.tolist()
        if self.entrywise is None:
            remaining = scaled_updates(current, updates, judged)
        else:
            scaled = [(updates[index][0], float(judged.scales[index])) for index in active]
            seed = derive_seed(self._seed, round, "robust")
            remaining = [(combine_updates(self.entrywise, current, scaled, rank=self._rank, seed=seed), 1.0)]
        aggregated = self.aggregation.aggregate(current, remaining, round=round)
        held = int((judged.scales[active] < 1).sum())
        return aggregated._replace(
            diagnostics=aggregated.diagnostics | {"left_out": float(len(updates) - len(active)), "held": float(held)}
        )


ROTATED = Linearity(
    linear=False,
    reason="a robust rule on entries of the product rotates the factors",
    rotation_reason="a robust rule on entries of the product rotates them",
)
"""Declaration of any aggregation after a rule that combines entries."""


def scaled_updates(current: Adapter, updates: Updates, judged: UpdateGeometry) -> Updates:
    """Split each remaining update into its scaled part and an unchanged adapter with the rest of its weight.

    Args:
        current: adapter that the round started from.
        updates: all updates.
        judged: weights and scales that the rules assigned.
    """
    scaled = []
    for index in judged.active.tolist():
        adapter, (weight, scale) = updates[index][0], (float(judged.weights[index]), float(judged.scales[index]))
        if scale > 0:
            scaled.append((adapter, weight * scale))
        if scale < 1:
            scaled.append((_unchanged(current, adapter), weight * (1 - scale)))
    return scaled


def _unchanged(current: Adapter, adapter: Adapter) -> Adapter:
    """Return the update that a device would have sent if training had changed nothing."""
    return {
        site: Factors(current[site].a[: len(factors.a)], current[site].b[:, : len(factors.a)])
        for site, factors in adapter.items()
    }
