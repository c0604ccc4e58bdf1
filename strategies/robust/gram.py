"""Inner products of the devices' changes by their factors: no out × in matrix is ever made.

⟨B_i A_i, B_j A_j⟩_F = tr((A_j A_iᵀ)(B_iᵀ B_j)): of all factors side by side, the entries of A Aᵀ ∘ Bᵀ B summed over the
block that two devices share.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.lora.adapter import Adapter, Factors
from strategies.aggregation import Updates
from strategies.robust import UpdateGeometry

_ROWS = 512  # directions whose products with all others are held at once


def changes(current: Adapter, updates: Updates) -> UpdateGeometry:
    """What devices made of `current`, their weights as they came; at least one update."""
    trained = [tuple(name in adapter and len(adapter[name].a) > 0 for adapter, _ in updates) for name in current]
    groups = {those: group for group, those in enumerate(dict.fromkeys(trained))}
    gram = torch.zeros(len(groups), len(updates), len(updates), dtype=torch.float64)
    squares = torch.zeros(len(trained), len(updates), dtype=torch.float64)
    for place, (name, site) in enumerate(current.items()):
        found = inner_products(site, [adapter.get(name) for adapter, _ in updates])
        gram[groups[trained[place]]] += found
        squares[place] = found.diagonal()
    weights = torch.tensor([weight for _, weight in updates], dtype=torch.float64)
    of_sites = torch.tensor([groups[those] for those in trained])
    return UpdateGeometry(gram, squares, of_sites, torch.tensor(trained), weights, torch.ones_like(weights))


def inner_products(current: Factors, devices: list[Factors | None]) -> Tensor:
    """⟨C_i, C_j⟩ of one site, float64 [K, K], with C_k = B_k A_k − B_g[:, :r_k] A_g[:r_k]: what it trained is changed.

    Zero for a device without the site. Takes the room of 512 of all directions' products with all.
    """
    ranks = [0 if factors is None else len(factors.a) for factors in devices]
    there = [factors for factors in devices if factors is not None]
    a = torch.cat([*(factors.a.double() for factors in there), current.a.double()])
    b = torch.cat([*(factors.b.double() for factors in there), current.b.double()], dim=1)
    signs = torch.zeros(len(devices), len(a), dtype=torch.float64)  # of each direction in each device's change
    start, own = 0, sum(ranks)
    for place, rank in enumerate(ranks):
        signs[place, start : start + rank] = 1.0
        signs[place, own : own + rank] = -1.0
        start += rank
    found = signs.new_zeros(len(devices), len(devices))
    for first in range(0, len(a), _ROWS):
        rows = slice(first, first + _ROWS)
        found += signs[:, rows] @ (((a[rows] @ a.T) * (b[:, rows].T @ b)) @ signs.T)
    return (found + found.T) / 2
