"""Directions in which people's adapters differ, and the coefficients of one person.

At a site with shared factors A [r, in] and B [out, r], K directions D [K, out, r] and coefficients c [K] add

    ΔW = (Σ_k c_k D_k) A

to the shared product B A. One vector c serves all sites, so that a person is described by K numbers, which are fitted
to few pictures without learning them by heart. The directions are shared. They are learned by all devices
(`training.personalization.directions`), as the loading matrix of a factor analysis is, or are the principal directions
of people's own B (`principal_directions`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from common.seeding import derive_seed
from models.lora.adapter import Adapter, Factors, Sites
from models.lora.batched_lora import BatchedFactors, Layout

Directions = Mapping[str, Tensor]
"""D [K, out, r] by the name of the site."""


def count(directions: Directions) -> int:
    """Return K; 0 without sites."""
    return next((len(tensor) for tensor in directions.values()), 0)


def personal_adapter(shared: Adapter, directions: Directions, coefficients: Tensor) -> Adapter:
    """Return the adapter that a person's coefficients add to the shared one.

    Args:
        shared: A [r, in] and B [out, r] per site; only A is used.
        directions: D [K, out, r] per site.
        coefficients: c [K].

    Returns:
        A [r, in] and Σ_k c_k D_k [out, r] at the sites of `directions`.
    """
    return {name: Factors(shared[name].a, combine(tensor, coefficients)) for name, tensor in directions.items()}


def combine(directions: Tensor, coefficients: Tensor) -> Tensor:
    """Compute Σ_k c_k D_k.

    Args:
        directions: D [K, out, r] of one site.
        coefficients: c [..., K].

    Returns:
        [..., out, r].
    """
    return torch.tensordot(coefficients, directions.to(coefficients), dims=1)


def init_directions(shared: Adapter, number: int, seed: int, *, scale: float) -> Directions:
    """Draw random directions. Not zero: at c = 0 and D = 0 both gradients vanish.

    Args:
        shared: A [r, in] and B [out, r] per site.
        number: K.
        seed: seed of the draws.
        scale: standard deviation of their entries.

    Returns:
        D [K, out, r] per site.
    """
    drawn = {}
    for name, (_, b) in shared.items():
        generator = torch.Generator().manual_seed(derive_seed(seed, name, "directions"))
        drawn[name] = scale * torch.randn(number, *b.shape, generator=generator)
    return drawn


def outer_change(coefficients: Tensor, before: Adapter, after: Adapter) -> dict[str, Tensor]:
    """Return c ⊗ ΔB, the change of the directions that a change of B stands for.

    By the chain rule ∂/∂D_k = c_k ∂/∂B: with c fixed, gradient descent on D moves it by c ⊗ ΔB, where ΔB is the step
    that gradient descent takes on B.

    Args:
        coefficients: c [K].
        before: B [out, r] before training, per site.
        after: B [out, r] after training.

    Returns:
        [K, out, r] per site of `after`.
    """
    return {name: torch.einsum("k,or->kor", coefficients, after[name].b - before[name].b) for name in after}


def shift_directions(directions: Directions, change: Mapping[str, Tensor]) -> Directions:
    """Return D + ΔD [K, out, r] per site."""
    return {name: tensor + change[name] for name, tensor in directions.items()}


def principal_directions(shared: Adapter, trained: Sequence[Adapter], number: int) -> Directions:
    """Return the principal directions of the changes that people made to the shared B.

    This is probabilistic PCA without its noise term, with the shared B as the mean: a direction that all people share
    is one of them. Directions are scaled to the root mean square of their coefficient, so that coefficients have a
    second moment of one (Tipping & Bishop, 1999, eq. 15).

    Args:
        shared: A [r, in] and B [out, r] per site.
        trained: the same with the B of each person.
        number: K, at most the number of people.

    Returns:
        D [K, out, r] per site.

    Raises:
        ValueError: too few people.
    """
    if len(trained) < number:
        raise ValueError(f"{number} directions need changes of {number} people or more, not of {len(trained)}")
    changes = [{name: person[name].b - b for name, (_, b) in shared.items()} for person in trained]
    rows = torch.stack([torch.cat([change.flatten() for change in one.values()]) for one in changes]).double()
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    scaled = (vectors[:number] * values[:number, None] / len(rows) ** 0.5).float()
    parts = scaled.split([b.numel() for _, b in shared.values()], dim=1)
    return {name: part.reshape(number, *b.shape) for (name, (_, b)), part in zip(shared.items(), parts, strict=True)}


def extend(shared: Adapter, directions: Directions) -> Adapter:
    """Attach directions to the shared adapter, for messages and checkpoints, as rank that has no effect of its own.

    D_k becomes r further columns of B, whose rows of A are zero: the product stays B A, so that whatever doesn't know
    of directions (evaluation, export, another strategy) is right without them.

    Args:
        shared: A [r, in] and B [out, r] per site.
        directions: D [K, out, r] per site.

    Returns:
        A [r (1 + K), in] and B [out, r (1 + K)] per site.
    """
    return {
        name: Factors(
            torch.cat([a, a.new_zeros(len(directions[name]) * len(a), a.shape[1])]),
            torch.cat([b, directions[name].permute(1, 0, 2).flatten(1)], dim=1),
        )
        for name, (a, b) in shared.items()
    }


def divide(extended: Adapter, number: int) -> tuple[Adapter, Directions]:
    """Invert `extend`.

    Args:
        extended: A [r (1 + K), in] and B [out, r (1 + K)] per site; rows of A after the first r are ignored.
        number: K.

    Returns:
        The shared adapter of rank r, and D [K, out, r] per site.

    Raises:
        ValueError: a rank is not a multiple of 1 + K.
    """
    shared, directions = {}, {}
    for name, (a, b) in extended.items():
        rank, rest = divmod(len(a), number + 1)
        if rest or not rank:
            raise ValueError(f"{name}: rank {len(a)} is not a multiple of 1 + {number} directions")
        shared[name] = Factors(a[:rank].contiguous(), b[:, :rank].contiguous())
        directions[name] = b[:, rank:].unflatten(1, (number, rank)).transpose(0, 1).contiguous()
    return shared, directions


def without_zero_rank(adapter: Adapter) -> Adapter:
    """Remove the rank of an adapter that has no effect at any site: rows of A that are zero.

    The product is unchanged. An adapter without such rows is returned as it is.

    Args:
        adapter: A [R, in] and B [out, R], of one rank at all sites.

    Returns:
        A [r, in] and B [out, r] per site; at least one rank is kept.
    """
    if len({len(a) for a, _ in adapter.values()}) != 1:
        return adapter
    used = torch.stack([(a != 0).any(1) for a, _ in adapter.values()]).any(0)
    used[0] = True
    if bool(used.all()):
        return adapter
    return {name: Factors(a[used].contiguous(), b[:, used].contiguous()) for name, (a, b) in adapter.items()}


class CoefficientLayout(Layout):
    """A layout whose rows hold the K coefficients of a client, with A and the directions shared by all rows.

    A coefficient's gradient is the inner product of its direction and the gradient of B, over all sites.

    Args:
        sites: dimensions by name.
        rank: r.
        number: K.
        like: dtype and device of the fixed factors.
    """

    def __init__(self, sites: Sites, rank: int, number: int, *, like: Tensor) -> None:
        self.sites, self.rank, self.number = dict(sites), rank, number
        self.widths, self.size = [number], number
        self._a = {name: like.new_zeros(1, rank, site.inputs) for name, site in sites.items()}
        self._directions = {name: like.new_zeros(number, site.outputs, rank) for name, site in sites.items()}

    @property
    def site_widths(self) -> list[int]:
        """One part: coefficients belong to all sites together."""
        return [self.number]

    def set_fixed(self, shared: Adapter, directions: Directions) -> None:
        """Set A [r, in] and D [K, out, r] of every site."""
        for name in self.sites:
            self._a[name][0].copy_(shared[name].a)
            self._directions[name].copy_(directions[name])

    def from_parts(self, parts: Sequence[Tensor]) -> dict[str, BatchedFactors]:
        """Build batched factors A [S, r, in] and Σ_k c_k D_k [S, out, r] of every site from coefficients [S, K]."""
        (coefficients,) = parts
        return {
            name: BatchedFactors(
                self._a[name].to(coefficients).expand(len(coefficients), -1, -1),
                combine(self._directions[name], coefficients),
            )
            for name in self.sites
        }

    def fits(self, adapter: Adapter) -> bool:  # noqa: ARG002
        """Return True: a row has no padding."""
        return True

    def pack(self, adapter: Adapter | None) -> Tensor:  # noqa: ARG002
        """Return a row of zeros [K]: training starts from the shared adapter."""
        return torch.zeros(self.number)

    def unpack(self, row: Tensor, like: Adapter) -> Adapter:
        """Return A [r, in] and Σ_k c_k D_k [out, r] per site from a row [K]; on the CPU."""
        coefficients = row.detach().cpu()
        return {
            name: Factors(factors.a, combine(self._directions[name].cpu(), coefficients))
            for name, factors in like.items()
        }

    def mask(self, like: Adapter) -> Tensor:  # noqa: ARG002
        """Return [K] true."""
        return torch.ones(self.number, dtype=torch.bool)
