"""An aggregation behind robust rules."""

from __future__ import annotations

from collections.abc import Collection
from copy import copy

from common.seeding import derive_seed
from models.lora.adapter import Adapter, Factors
from strategies.aggregation import Aggregated, Aggregation, Linearity, RankAware, Updates, check
from strategies.robust import EntrywiseRule, RobustRules, UpdateGeometry
from strategies.robust.gram import changes
from strategies.robust.trimmed import combined


class RobustAggregation:
    """Rules judge the changes of a round, one after the other; the aggregation gets what they leave.

    A change that counts with the share s only is made of two updates: the device's with s of its weight, and one that
    changed nothing with the rest. Of a mean of products, as `exact` is, that is the mean with s · C_k; of a mean of
    factors, as `fedit` is, that with each factor s of its way. The bound then is on what a device adds to the mean of
    products, and no rule sees what means of factors make of factors that were turned: use `exact` against whoever may
    turn them.

    Args:
        rules: in their order.
        entrywise: makes one update of what they leave, for the aggregation to bring into its own form.
        rank: of that one, at most; None: all that it has.
        seed: of the random vectors that it is compressed with.

    Raises ValueError for an aggregation whose devices keep their B.
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
        if aggregation.trains(1) == "split":
            raise ValueError("rules judge products, and with this aggregation no device sends one")
        self.mixed_ranks = aggregation.mixed_ranks
        self.sensitivity = aggregation.sensitivity if entrywise is None else _TURNED
        self.stable_factors = aggregation.stable_factors and entrywise is None
        self.trains = aggregation.trains
        self._aggregation, self._rules, self._entrywise = aggregation, rules, entrywise
        self._rank, self._seed = rank, seed

    def with_ranks(self, ranks: Collection[int]) -> RobustAggregation:
        """As of `strategies.aggregation.RankAware`, if the rule behind it is."""
        found = copy(self)
        if isinstance(self._aggregation, RankAware):
            found._aggregation = self._aggregation.with_ranks(ranks)
        return found

    def aggregate(self, current: Adapter, updates: Updates, *, round: int) -> Aggregated:
        """What the aggregation makes of it.

        Further diagnostics: `left_out`, devices without any weight; `held`, those whose change was scaled down.
        """
        check(updates)
        judged = changes(current, updates)
        for rule in self._rules:
            judged = rule.reweight(judged)
        left = judged.there.tolist()
        if self._entrywise is None:
            remaining = counting(current, updates, judged)
        else:
            scaled = [(updates[place][0], float(judged.scales[place])) for place in left]
            seed = derive_seed(self._seed, round, "robust")
            remaining = [(combined(self._entrywise, current, scaled, rank=self._rank, seed=seed), 1.0)]
        found = self._aggregation.aggregate(current, remaining, round=round)
        held = int((judged.scales[left] < 1).sum())
        return found._replace(
            diagnostics=found.diagnostics | {"left_out": float(len(updates) - len(left)), "held": float(held)}
        )


_TURNED = Linearity(
    linear=False,
    reason="a robust rule that goes by entries of the product turns the factors",
    turned="a robust rule that goes by entries of the product turns them",
)


def counting(current: Adapter, updates: Updates, judged: UpdateGeometry) -> Updates:
    """The updates as far as they count, and what did not change in place of the rest of each."""
    found = []
    for place in judged.there.tolist():
        adapter, (weight, scale) = updates[place][0], (float(judged.weights[place]), float(judged.scales[place]))
        if scale > 0:
            found.append((adapter, weight * scale))
        if scale < 1:
            found.append((_unchanged(current, adapter), weight * (1 - scale)))
    return found


def _unchanged(current: Adapter, adapter: Adapter) -> Adapter:
    """What a device would have sent had training moved nothing."""
    return {
        site: Factors(current[site].a[: len(factors.a)], current[site].b[:, : len(factors.a)])
        for site, factors in adapter.items()
    }
