"""Inner products of the devices' changes in factored form, without any out × in matrix.

⟨B_i A_i, B_j A_j⟩_F = tr((A_j A_iᵀ)(B_iᵀ B_j)). With the factors of all devices stacked, this is the sum of the entries
of A Aᵀ ∘ Bᵀ B in the block of two devices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.lora.adapter import Adapter, Factors
from strategies.aggregation import Updates
from strategies.robust import UpdateGeometry

_ROWS = 512  # directions whose products with all directions are in memory at once


def changes(current: Adapter, updates: Updates) -> UpdateGeometry:
    """Compute the geometry of the changes from `current`, with the original weights; at least one update."""
    trained = [tuple(name in adapter and len(adapter[name].a) > 0 for adapter, _ in updates) for name in current]
    groups = {devices: group for group, devices in enumerate(dict.fromkeys(trained))}
    gram = torch.zeros(len(groups), len(updates), len(updates), dtype=torch.float64)
    squares = torch.zeros(len(trained), len(updates), dtype=torch.float64)
    for index, (name, site) in enumerate(current.items()):
        products = inner_products(site, [adapter.get(name) for adapter, _ in updates])
        gram[groups[trained[index]]] += products
        squares[index] = products.diagonal()
    weights = torch.tensor([weight for _, weight in updates], dtype=torch.float64)
    group_of_site = torch.tensor([groups[devices] for devices in trained])
    return UpdateGeometry(gram, squares, group_of_site, torch.tensor(trained), weights, torch.ones_like(weights))


def inner_products(current: Factors, devices: list[Factors | None]) -> Tensor:
    """Compute ⟨C_i, C_j⟩ at one site, with C_k = B_k A_k − B_g[:, :r_k] A_g[:r_k].

    Uses memory for the products of `_ROWS` directions with all directions.

    Args:
        current: factors that the round started from.
        devices: trained factors of each device; None if it did not train the site, which gives zeros.

    Returns:
        Float64 `[K, K]`.
    """
    ranks = [0 if factors is None else len(factors.a) for factors in devices]
    trained = [factors for factors in devices if factors is not None]
    a = torch.cat([*(factors.a.double() for factors in trained), current.a.double()])
    b = torch.cat([*(factors.b.double() for factors in trained), current.b.double()], dim=1)
    signs = torch.zeros(len(devices), len(a), dtype=torch.float64)  # of each direction in each device's change
    start, own = 0, sum(ranks)
    for index, rank in enumerate(ranks):
        signs[index, start : start + rank] = 1.0
        signs[index, own : own + rank] = -1.0
        start += rank
    products = signs.new_zeros(len(devices), len(devices))
    for first in range(0, len(a), _ROWS):
        rows = slice(first, first + _ROWS)
        products += signs[:, rows] @ (((a[rows] @ a.T) * (b[:, rows].T @ b)) @ signs.T)
    return (products + products.T) / 2
