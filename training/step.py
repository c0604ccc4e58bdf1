"""What a pass is for: the gradient of every entry, summed to units, clipped and summed to clients."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common import counter_rng
from models.base.denoiser import Denoiser
from models.diffusion.objective import add_noise, per_example_loss, target
from privacy.clipping import ClippedGradients, sum_segments
from training.buffers import CohortBuffers
from training.microbatching import Microbatch


class Entries(NamedTuple):
    """The entries [n] of a pass, on the device."""

    rows: Tensor
    examples: Tensor
    noise_keys: Tensor
    phases: Tensor
    weights: Tensor


class PassResult(NamedTuple):
    """What a pass found for its c clients. A piece of a unit can't be clipped before the unit is whole."""

    clients: Tensor  # [c]
    losses: Tensor  # [c], summed over entries
    clipped: ClippedGradients | None
    piece: Tensor | None  # [1, D]


def on_device(pack: Microbatch, device: torch.device) -> Entries:
    """The pack's entries, in two transfers."""
    numbers = torch.from_numpy(np.stack([pack.rows, pack.examples, pack.noise_keys]))
    shares = torch.from_numpy(np.stack([pack.phases, pack.weights]))
    return Entries(*numbers.to(device), *shares.to(device))


def gradients(
    base: Denoiser, rows: CohortBuffers, entries: Entries, *, compiled: bool = False
) -> tuple[Tensor, Tensor]:
    """Forward and backward: the weighted gradient [n, D] and the loss [n] of each entry.

    Each site's factors are leaves of their own: cut from one leaf, their gradients would each be padded to all of D.
    """
    schedule, layout = base.schedule, rows.layout
    x0, context = rows.latents[entries.examples], rows.context[entries.examples]
    noise = counter_rng.normals(entries.noise_keys, x0[0].numel()).to(x0).view_as(x0)
    t = (entries.phases * len(schedule)).long()
    copies = rows.adapters[entries.rows].to(base.dtype)
    parts = [part.detach().requires_grad_() for part in copies.split(layout.widths, dim=1)]
    with base.use_adapters([rows.frozen(entries.rows), layout.from_parts(parts)], compiled=compiled) as denoise:
        output = denoise(add_noise(schedule, x0, noise, t), schedule.times[t], context)
        losses = per_example_loss(output, target(schedule, x0, noise, t))
        if not layout.size:  # rank 0: nothing to train
            return copies.to(x0), losses.detach()
        found = torch.autograd.grad((losses * entries.weights).sum(), parts)
    return torch.cat([part.to(x0) for part in found], dim=1), losses.detach()


def reduce(rows: CohortBuffers, pack: Microbatch, found: Tensor, losses: Tensor) -> PassResult:
    """Gradients [n, D] and losses [n] of a pack's entries, brought together by client; `found` is overwritten.

    What a pack is filled up with has gradients of zero, and its losses are left out.
    """
    counts = (pack.clients, pack.units, pack.entries, pack.unit_sizes)
    clients, units, entries, sizes = (torch.from_numpy(values).to(found.device) for values in counts)
    per_client = sum_segments(losses[: int(pack.entries.sum())].double(), entries)
    if len(sizes) < pack.size:
        found = sum_segments(found, sizes)
    if pack.piece:
        return PassResult(clients, per_client, None, found)
    return PassResult(clients, per_client, rows.sums.clip(clients, found, units), None)


def clip_whole(rows: CohortBuffers, client: Tensor, unit: Tensor) -> ClippedGradients:
    """One client's [1] unit [1, D] that was put together from its pieces, clipped."""
    return rows.sums.clip(client, unit, torch.ones_like(client))
