"""Cost of training any subset S of a base's sites, from two dry runs.

Layers before the first trained site need no backward pass, so autograd saves no tensors of them. Every trained site
needs its factors, moments and gradients. Costs of subsets differ only by these:

    bytes(S) = max(all − saved before the first of S, forward only) + Σ over S of the site's own bytes
    work(S)  = forward + backward · (fraction of the forward pass after the first of S)
               + Σ over S of the site's own work

Bytes should never be less than in a dry run of the same sites (`tests/models/footprint/test_site_costs.py`): inputs
that an operation saves for a gradient that isn't needed are not subtracted.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from models.diffusion.denoiser import Denoiser
from models.diffusion.objective import per_example_loss
from models.footprint.dry_run import OPS_PER_BYTE, DryRun
from models.footprint.footprint import (
    MODULE_BYTES,
    copy_for_dry_run,
    dry_run_mode,
    forward_backward,
    resident_bytes,
    split_layout,
)
from models.lora.batched_lora import slot_layers

TRAINED_BYTES = 20
"""Bytes of a trained number beyond those of a frozen one: as received, as trained, two moments and the gradient sum."""


@dataclass(frozen=True, kw_only=True)
class SiteCost:
    """Cost of training one site."""

    name: str
    peak_bytes: int
    """Peak bytes of a pass whose first trained site is this one, excluding the trained sites' own buffers."""
    site_bytes: int
    """Own buffers of this site."""
    work: float
    """Time of such a pass, excluding the trained sites' own gradients, relative to a pass that trains at every site."""
    site_work: float
    """Time of the gradients of this site's factors, relative to a pass that trains at every site."""


@dataclass(frozen=True, kw_only=True)
class PassCosts:
    """Costs of passes that train a subset of sites."""

    sites: tuple[SiteCost, ...]
    """Costs of the sites, in the order of a forward pass."""

    def bytes(self, names: Collection[str]) -> int:
        """Return the peak bytes of a pass that trains these sites. ValueError if there are none or unknown ones."""
        sites = self._select(names)
        return sites[0].peak_bytes + sum(site.site_bytes for site in sites)

    def work(self, names: Collection[str]) -> float:
        """Return the time of a pass relative to one that trains at every site. ValueError as for `bytes`."""
        sites = self._select(names)
        return sites[0].work + sum(site.site_work for site in sites)

    def _select(self, names: Collection[str]) -> list[SiteCost]:
        sites = [site for site in self.sites if site.name in names]
        if not sites or len(sites) < len(names):
            raise ValueError("sites: empty, or with a site that the base doesn't have")
        return sites


@dataclass
class _Trace:
    """Dry run, and its state at the first call of each site."""

    live: dict[str, int] = field(default_factory=dict)  # bytes at that time
    done: dict[str, float] = field(default_factory=dict)  # work until that time
    tokens: dict[str, int] = field(default_factory=dict)
    peak: int = 0
    work: float = 0.0

    def hook(self, run: DryRun, name: str) -> Any:
        """Return a forward pre-hook for a site; a plain function, which copies of its module share."""

        def record(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            (x,) = inputs
            channels = x.shape[1] if x.dim() == 4 else x.shape[-1]
            self.live.setdefault(name, run.live)
            self.done.setdefault(name, _work(run))
            self.tokens.setdefault(name, x.numel() // channels)

        return record


def pass_costs(
    base: Denoiser, latents: torch.Size, context: torch.Size, *, rank: int, runtime_bytes: int = 0
) -> PassCosts:
    """Measure the cost of training each site, in microbatches of one example.

    Args:
        base: result of `meta_denoiser`, or a loaded base.
        latents: shape of one example's latents.
        context: shape of one example's packed caption.
        rank: rank of the adapter.
        runtime_bytes: bytes of the process without a network.
    """
    full, forward = (_trace(base, latents, context, rank, train=train) for train in (True, False))
    constant = resident_bytes(base) + MODULE_BYTES * len(list(base.network.modules())) + runtime_bytes
    numbers = {name: rank * (site.inputs + site.outputs) for name, site in base.sites.items()}
    gradients = {name: 4.0 * full.tokens[name] * numbers[name] for name in numbers}
    first = min(forward.done.values())
    backward = full.work - forward.work - sum(gradients.values())
    return PassCosts(
        sites=tuple(
            SiteCost(
                name=name,
                peak_bytes=constant + max(full.peak - (full.live[name] - forward.live[name]), forward.peak),
                site_bytes=TRAINED_BYTES * numbers[name],
                work=(forward.work + backward * (forward.work - forward.done[name]) / (forward.work - first))
                / full.work,
                site_work=gradients[name] / full.work,
            )
            for name in full.live
        )
    )


def _trace(base: Denoiser, latents: torch.Size, context: torch.Size, rank: int, *, train: bool) -> _Trace:
    """Trace a pass that trains at every site, or a forward pass without gradients."""
    base, trace = copy_for_dry_run(base), _Trace()
    trained, frozen = split_layout(base, rank, None if train else ())
    with dry_run_mode(base) as run:
        for name, layer in slot_layers(base.network).items():
            layer.register_forward_pre_hook(trace.hook(run, name))
        x, texts = (torch.zeros(1, *shape) for shape in (latents, context))
        rows, frozen_factors = torch.zeros(1, trained.size), frozen.stacks(torch.zeros(1, frozen.size))
        if train:
            forward_backward(base, x, texts, trained, rows, frozen_factors)
        else:
            with torch.no_grad(), base.use_adapters([frozen_factors]) as denoise:
                per_example_loss(denoise(x, x.new_zeros(1), texts), x)
    trace.peak, trace.work = run.activations_bytes + run.workspace_bytes, _work(run)
    return trace


def _work(run: DryRun) -> float:
    """Return arithmetic operations, plus the operations that would take as long as the memory-bound part."""
    return float(run.matrix_operations + run.convolution_operations + OPS_PER_BYTE * run.moved_bytes)
