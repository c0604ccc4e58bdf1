"""How the adapters of one round become the next shared adapter."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from models.lora.adapter import Adapter, Factors

Updates = Sequence[tuple[Adapter, float]]
"""Each device's trained factors, at the sites that it trained, and its weight > 0."""

SiteUpdates = Sequence[tuple[Factors, float]]
"""Of one site: the factors of each device that trained it, and its weight p_k / Σ p among those."""


class Aggregated(NamedTuple):
    """The next shared adapter, and numbers about how it was made."""

    adapter: Adapter
    diagnostics: dict[str, float]


class Linearity(NamedTuple):
    """What a rule declares of itself; under privacy one that declares nothing is refused."""

    linear: bool
    """Whether the next adapter follows from the mean of the devices' changes, factor by factor, and from the adapter
    that was sent, which is public: then clipping each and noising their sum once bounds what a device can do, and all
    that is made of it is post-processing. Whatever is made of updates that are private already needs no such bound."""
    reason: str
    turned: str | None = None
    """Why a direction of its factors is not the one that it was in the round before; None: it is."""


class Aggregation(Protocol):
    """A pure rule: the same updates in the same order give the same adapter."""

    sensitivity: Linearity

    mixed_ranks: bool
    """Whether devices may train fewer directions than the shared adapter has."""

    stable_factors: bool
    """Whether what is trained means the same in the next round: then what rounding left of one change may go into the
    next one."""

    def trains(self, round: int, /) -> str:
        """What devices train in a round (`models.lora.trainable.PARTS`)."""
        ...

    def aggregate(self, current: Adapter, updates: Updates, *, round: int) -> Aggregated:
        """The adapter after a round that started from `current`; at least one update.

        A site is a matter of the devices that trained it; one that nobody trained stays as it is.
        """
        ...


@runtime_checkable
class RankAware(Protocol):
    """A rule that keeps the first directions apart from the next, at the ranks that devices train."""

    def with_ranks(self, ranks: Collection[int]) -> Aggregation:
        """The same rule, which goes by these ranks: updates of older adapters don't show theirs, nor does one that is
        made of all of them."""
        ...


def shares(updates: Updates, site: str) -> SiteUpdates:
    """Those who trained a site, one direction or more: who did not does not dilute its mean. None if nobody did."""
    each = ((adapter.get(site), weight) for adapter, weight in updates)
    there = [(factors, weight) for factors, weight in each if factors is not None and len(factors.a)]
    total = sum(weight for _, weight in there)
    return [(factors, weight / total) for factors, weight in there]


def always(trains: str) -> Callable[[int], str]:
    """Of a rule under which devices train the same in every round."""
    return lambda _: trains


def check(updates: Updates) -> None:
    """ValueError without an update, or for a weight that is not over 0."""
    if not updates:
        raise ValueError("nothing to aggregate: keep the old adapter when no device replied")
    weights = [weight for _, weight in updates]
    if not all(weight > 0 for weight in weights):
        raise ValueError(f"{weights=}: must be over 0")
