"""Aggregation rules: pure functions from the updates of one round to the next shared adapter.

Each module registers its rule as `@aggregation("name")`. The parameters `rank` and `seed` of its constructor are filled
in from the configuration; others are its options (`strategies.declarations`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from common.plugins import Registry
from models.lora.adapter import Adapter, Factors

AGGREGATIONS: Registry[Any] = Registry("aggregation", key="aggregation", modules=__name__)
aggregation = AGGREGATIONS.register

Updates = Sequence[tuple[Adapter, float]]
"""Trained factors of each device, at the sites that it trained, and its weight > 0."""

SiteUpdates = Sequence[tuple[Factors, float]]
"""Updates at one site: the factors of each device that trained it, and its weight p_k / Σ p among those devices."""


class Aggregated(NamedTuple):
    """Next shared adapter, with diagnostics by name."""

    adapter: Adapter
    diagnostics: dict[str, float]


class Linearity(NamedTuple):
    """Sensitivity declaration of an aggregation rule. A rule without one is refused under privacy."""

    linear: bool
    """Whether the next adapter is a function of the mean change of the devices, factor by factor, and of the adapter
    that was sent, which is public. Then clipping each change and noising their sum once bounds the influence of a
    device, and everything derived from that sum is post-processing. Updates that are already private need no such
    bound."""
    reason: str
    rotation_reason: str | None = None
    """Why a direction of the factors differs from the direction of the same index in the previous round; None if it is
    the same direction."""


UNDECLARED = Linearity(
    linear=False, reason="it declares no sensitivity", rotation_reason="the rule declares no sensitivity"
)
"""Declaration of a rule that has none: nothing is assumed about it."""


class Aggregation(Protocol):
    """Pure aggregation rule: the same updates in the same order give the same adapter.

    A class may also declare `conflicts` (`strategies.declarations`), `rebase` if it can use updates of an older adapter
    (`strategies.fedbuff`), `own_rank` if its result may have another rank, up to its `max_rank`, and `by_slice` if it
    weights slices of rank separately.
    """

    sensitivity: Linearity

    mixed_ranks: bool
    """Whether devices may train fewer directions than the shared adapter has."""

    stable_factors: bool
    """Whether the trained tensors keep their meaning in the next round, so that the quantization residual of one change
    may be added to the next one."""

    def trains(self, round: int, /) -> str:
        """Return which part of the adapter devices train in a round (`models.lora.trainable.TRAINED_TENSORS`)."""
        ...

    def aggregate(self, current: Adapter, updates: Updates, *, round: int) -> Aggregated:
        """Compute the adapter after a round.

        Each site is aggregated over the devices that trained it. A site that no device trained stays unchanged.

        Args:
            current: adapter that the round started from.
            updates: at least one update.
            round: number of the round, 1 or more.
        """
        ...


@runtime_checkable
class RankAware(Protocol):
    """Rule that keeps the directions of different device ranks apart (a rotation never mixes them)."""

    def with_ranks(self, ranks: Collection[int]) -> Aggregation:
        """Return the same rule with the given device ranks.

        They are passed explicitly because rebased updates of older adapters, and one update that combines all devices,
        don't show the ranks that devices trained.
        """
        ...


def site_updates(updates: Updates, site: str) -> SiteUpdates:
    """Collect the updates of the devices that trained at least one direction of a site, with normalized weights.

    Devices that did not train the site do not dilute its mean. Empty if no device trained it.
    """
    factors_and_weights = ((adapter.get(site), weight) for adapter, weight in updates)
    trained = [(factors, weight) for factors, weight in factors_and_weights if factors is not None and len(factors.a)]
    total = sum(weight for _, weight in trained)
    return [(factors, weight / total) for factors, weight in trained]


def declared_linearity(rule: Aggregation) -> Linearity:
    """Return the declaration of a rule, `UNDECLARED` if it has none."""
    declared: Linearity | None = getattr(rule, "sensitivity", None)
    return UNDECLARED if declared is None else declared


def in_every_round(part: str) -> Callable[[int], str]:
    """Make the `trains` method of a rule under which devices train the same part in every round."""
    return lambda _: part


def check_updates(updates: Updates) -> None:
    """Raise ValueError if there is no update, or a weight is not positive."""
    if not updates:
        raise ValueError("no updates to aggregate: keep the current adapter if no device replied")
    weights = [weight for _, weight in updates]
    if not all(weight > 0 for weight in weights):
        raise ValueError(f"{weights=}: must be over 0")
