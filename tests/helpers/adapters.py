"""Random adapters for tests; B is random too, because B = 0 would hide most errors."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from models.lora.adapter import Adapter, Factors, Sites


def random_adapter(
    sites: Sites, ranks: int | Mapping[str, int], seed: int = 0, dtype: torch.dtype = torch.float32
) -> Adapter:
    """Draw factors of one rank at every site, or of given ranks at some; products are as large as a layer's weights."""
    generator = torch.Generator().manual_seed(seed)
    ranks = dict.fromkeys(sites, ranks) if isinstance(ranks, int) else ranks

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        name: Factors(
            (normal(rank, sites[name].inputs) / sites[name].inputs ** 0.5).to(dtype),
            normal(sites[name].outputs, rank).to(dtype),
        )
        for name, rank in ranks.items()
    }
