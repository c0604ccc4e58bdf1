"""Updates of one site as stacked tensors, so that one operation serves many devices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from models.lora.adapter import Factors
from strategies.aggregation import Updates, site_updates

PART = 64
"""Maximum number of devices that are stacked, so that memory does not grow with the devices of a round."""


@runtime_checkable
class StackedUpdates(Protocol):
    """Updates of weight 1 that are stored as one tensor, e.g. `strategies.round.update_spool.UpdateSpool`."""

    def stack(self, site: str, /) -> tuple[Factors, Tensor] | None:
        """Return A `[K, r, in]` and B `[K, out, r]` of all devices, and the order `[K]` in which they are summed.

        None if devices differ in their sites or ranks, or none has this site.
        """
        ...


class StackPart(NamedTuple):
    """Updates of n ≤ `PART` devices, float64."""

    a: Tensor
    """`[n, r, in]`"""
    b: Tensor
    """`[out, n, r]`: flattened, the columns that belong to the rows of A."""
    weights: Tensor
    """`[n]`, p_k / Σ p over all devices that trained the site."""


class SiteStack:
    """Updates of the devices that trained a site.

    Args:
        updates: updates of a round.
        site: name of the site.

    Attributes:
        ranks: ranks of the devices, ascending; empty if no device trained the site.
        directions: sum of their ranks.
    """

    def __init__(self, updates: Updates, site: str) -> None:
        self._stack = updates.stack(site) if isinstance(updates, StackedUpdates) else None
        if self._stack and not self._stack[0].a.shape[1]:
            self._stack = None
        self._updates = [] if self._stack else site_updates(updates, site)
        ranks = [factors.a.shape[0] for factors, _ in self._updates]
        if self._stack:
            ranks = [self._stack[0].a.shape[1]] * len(self._stack[1])
        self.ranks, self.directions = sorted(set(ranks)), sum(ranks)

    def parts(self) -> Iterator[StackPart]:
        """Yield the updates in parts, for devices of one rank."""
        if self._stack:
            (a, b), order = self._stack
            for rows in order.split(PART):
                weights = torch.full((len(rows),), 1 / len(order), dtype=torch.float64)
                yield StackPart(a[rows].double(), b.transpose(0, 1).index_select(1, rows).double(), weights)
        for start in range(0, len(self._updates), PART):
            part = self._updates[start : start + PART]
            yield StackPart(
                torch.stack([factors.a for factors, _ in part]).double(),
                torch.stack([factors.b for factors, _ in part], dim=1).double(),
                torch.tensor([p for _, p in part], dtype=torch.float64),
            )
