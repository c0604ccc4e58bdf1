"""What it costs to train at some of a base's sites only, for any of them, from two dry runs.

Nothing that comes before the first trained site needs a backward pass, so autograd keeps nothing of it; every site that
is trained takes its factors, its moments and its gradients. In that alone sets of sites differ:

    bytes(S) = max(all − kept before the first of S, forward alone) + Σ over S of what a site takes itself
    work(S)  = forward + backward · (share of the forward pass that lies behind the first of S) + Σ of the sites' own

Bytes are meant not to be less than a dry run of these very sites finds (`tests/models/footprint/test_site_costs.py`): what an
operation keeps of its input for a gradient that nobody asks for is not taken off.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from models.base.denoiser import Denoiser
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

OWN = 20
"""Bytes that a number takes where it is trained, beside what it takes where it is not: itself, as it came and as it is
trained, two moments and the sum of gradients."""


@dataclass(frozen=True, kw_only=True)
class SiteCost:
    """Of one site."""

    name: str
    peak_bytes: int
    """What a pass holds that comes to this site first of those that it trains, without what these take themselves."""
    site_bytes: int
    """What this one takes itself."""
    work: float
    """How long such a pass takes, as a share of one that trains at every site; without any site's own."""
    site_work: float
    """Of the gradients of this one's factors."""


@dataclass(frozen=True, kw_only=True)
class PassCosts:
    """Of passes that train at some sites."""

    sites: tuple[SiteCost, ...]
    """In the order in which a pass comes to them."""

    def bytes(self, chosen: Collection[str]) -> int:
        """The most that a pass holds which trains at these. ValueError if there are none, or other ones."""
        found = self._chosen(chosen)
        return found[0].peak_bytes + sum(site.site_bytes for site in found)

    def work(self, chosen: Collection[str]) -> float:
        """How long it takes, as a share of one that trains at all of them. ValueError as of `bytes`."""
        found = self._chosen(chosen)
        return found[0].work + sum(site.site_work for site in found)

    def _chosen(self, names: Collection[str]) -> list[SiteCost]:
        found = [site for site in self.sites if site.name in names]
        if not found or len(found) < len(names):
            raise ValueError("sites: none, or some that the base has not")
        return found


@dataclass
class _Watched:
    """A pass, and where it stood when it came to each site for the first time."""

    live: dict[str, int] = field(default_factory=dict)
    done: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    peak: int = 0
    work: float = 0.0

    def watch(self, run: DryRun, name: str) -> Any:
        """A hook for the site of this name; a plain function, which copies of its module share."""

        def come(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            (x,) = inputs
            channels = x.shape[1] if x.dim() == 4 else x.shape[-1]
            self.live.setdefault(name, run.live)
            self.done.setdefault(name, _work(run))
            self.tokens.setdefault(name, x.numel() // channels)

        return come


def pass_costs(
    base: Denoiser, latents: torch.Size, context: torch.Size, *, rank: int, runtime_bytes: int = 0
) -> PassCosts:
    """Of a base's shapes, or of a base that is there, in micro-batches of one picture.

    Args:
        latents, context: shapes of one example.
        rank: of the adapter.
        runtime_bytes: of the process without a network.
    """
    every, none = (_watched(base, latents, context, rank, train=train) for train in (True, False))
    always = resident_bytes(base) + MODULE_BYTES * len(list(base.network.modules())) + runtime_bytes
    numbers = {name: rank * (site.inputs + site.outputs) for name, site in base.sites.items()}
    own = {name: 4.0 * every.tokens[name] * numbers[name] for name in numbers}
    first = min(none.done.values())
    backward = every.work - none.work - sum(own.values())
    return PassCosts(
        sites=tuple(
            SiteCost(
                name=name,
                peak_bytes=always + max(every.peak - (every.live[name] - none.live[name]), none.peak),
                site_bytes=OWN * numbers[name],
                work=(none.work + backward * (none.work - none.done[name]) / (none.work - first)) / every.work,
                site_work=own[name] / every.work,
            )
            for name in every.live
        )
    )


def _watched(base: Denoiser, latents: torch.Size, context: torch.Size, rank: int, *, train: bool) -> _Watched:
    """A pass that trains at every site, or one forward alone."""
    base, found = copy_for_dry_run(base), _Watched()
    trained, frozen = split_layout(base, rank, None if train else ())
    with dry_run_mode(base) as run:
        for name, layer in slot_layers(base.network).items():
            layer.register_forward_pre_hook(found.watch(run, name))
        x, texts = (torch.zeros(1, *shape) for shape in (latents, context))
        rows, others = torch.zeros(1, trained.size), frozen.stacks(torch.zeros(1, frozen.size))
        if train:
            forward_backward(base, x, texts, trained, rows, others)
        else:
            with torch.no_grad(), base.use_adapters([others]) as denoise:
                per_example_loss(denoise(x, x.new_zeros(1), texts), x)
    found.peak, found.work = run.activations_bytes + run.workspace_bytes, _work(run)
    return found


def _work(run: DryRun) -> float:
    """Operations of arithmetic, and those that would take as long as what memory sets the pace of."""
    return float(run.matrix_operations + run.convolution_operations + OPS_PER_BYTE * run.moved_bytes)
