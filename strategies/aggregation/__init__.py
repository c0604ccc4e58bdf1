"""How the adapters of one round become the next shared adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from models.adapter import Adapter
from models.bounds import squared_norm

Updates = Sequence[tuple[Adapter, float]]
"""Each device's trained factors, and its weight > 0."""


class Aggregated(NamedTuple):
    """The next shared adapter, and numbers about how it was made."""

    adapter: Adapter
    diagnostics: dict[str, float]


class Linearity(NamedTuple):
    """What a rule declares of itself; under privacy one that declares nothing is refused."""

    linear: bool
    """Whether the change of the adapter is the mean of the devices' changes, factor by factor: then clipping each and
    noising their sum once bounds what a device can do. Whatever is made of updates that are private already needs no
    such bound."""
    reason: str


class Aggregation(Protocol):
    """A pure rule: the same updates in the same order give the same adapter."""

    sensitivity: Linearity

    mixed_ranks: bool
    """Whether devices may train fewer directions than the shared adapter has."""

    def aggregate(self, current: Adapter, updates: Updates, *, round: int) -> Aggregated:
        """The adapter after a round that started from `current`; at least one update."""
        ...


def normalised(updates: Updates) -> list[float]:
    """The weights p_k / Σ p. ValueError without an update, or for a weight that is not over 0."""
    if not updates:
        raise ValueError("nothing to aggregate: keep the old adapter when no device replied")
    weights = [weight for _, weight in updates]
    if not all(weight > 0 for weight in weights):
        raise ValueError(f"{weights=}: must be over 0")
    return [weight / sum(weights) for weight in weights]


def relative_residual(a: Tensor, b: Tensor, to_a: Tensor, to_b: Tensor) -> float:
    """‖B A − B' A'‖_F / ‖B' A'‖_F in float64: how far a product is from the one it stands for; 0 if that is 0."""
    a, b, to_a, to_b = (factor.double() for factor in (a, b, to_a, to_b))
    whole = squared_norm(to_a, to_b)
    if whole == 0:
        return 0.0
    return float((squared_norm(torch.cat([a, to_a]), torch.cat([b, -to_b], dim=1)) / whole).sqrt())


def stacked_mean(current: Adapter, updates: Updates, site: str) -> tuple[Tensor, Tensor]:
    """The true mean Σ p_k ΔW_k of one site as factors A [S, in], B [out, S], float64, not compressed.

    Device k trained the first r_k directions of the current factors (A_g, B_g) and left the others as they
    were, so ΔW_k = B_k A_k + B_g[:, r_k:] A_g[r_k:]. Summed, direction j of the current factors stays with weight
    w_j = Σ {p_k : r_k ≤ j}.
    """
    shares = normalised(updates)
    factors = [adapter[site] for adapter, _ in updates]
    ranks = [f.a.shape[0] for f in factors]
    kept = min(ranks)  # directions before it were trained by everyone
    tail_a, tail_b = current[site].a[kept:].double(), current[site].b[:, kept:].double()
    columns = range(kept, current[site].a.shape[0])
    left = [sum(p for p, rank in zip(shares, ranks, strict=True) if rank <= j) for j in columns]
    a = torch.cat([*(f.a.double() for f in factors), tail_a])
    scaled = [p * f.b.double() for p, f in zip(shares, factors, strict=True)]
    return a, torch.cat([*scaled, tail_b * torch.tensor(left, dtype=torch.float64)], dim=1)
