"""One pass of training: the gradient of every entry, summed by unit, clipped, and summed by client."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common import counter_rng
from models.diffusion.denoiser import Denoiser
from models.diffusion.objective import add_noise, per_example_loss, target
from privacy.dp_sgd import ClippedGradients, sum_segments
from training.buffers import CohortBuffers
from training.microbatching import Microbatch


class Entries(NamedTuple):
    """Entries [n] of a pass, on the device."""

    rows: Tensor
    examples: Tensor
    noise_keys: Tensor
    phases: Tensor
    weights: Tensor


class PassResult(NamedTuple):
    """Result of a pass for its c clients. A piece of a unit can't be clipped before the unit is complete."""

    clients: Tensor  # [c]
    losses: Tensor  # [c], summed over entries
    clipped: ClippedGradients | None
    piece: Tensor | None  # [1, D]


def on_device(microbatch: Microbatch, device: torch.device) -> Entries:
    """Copy a microbatch's entries to the device, in two transfers."""
    numbers = torch.from_numpy(np.stack([microbatch.rows, microbatch.examples, microbatch.noise_keys]))
    shares = torch.from_numpy(np.stack([microbatch.phases, microbatch.weights]))
    return Entries(*numbers.to(device), *shares.to(device))


def gradients(
    base: Denoiser, buffers: CohortBuffers, entries: Entries, *, compiled: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute the weighted gradient and the loss of each entry.

    Each site's factors are separate leaves. As slices of one leaf, their gradients would each be padded to all of D.

    Args:
        base: the base.
        buffers: adapters and examples of the resident jobs.
        entries: entries [n] of the pass.
        compiled: use the compiled network (CUDA only).

    Returns:
        Gradients [n, D] and losses [n].
    """
    schedule, layout = base.schedule, buffers.layout
    x0, context = buffers.latents[entries.examples], buffers.context[entries.examples]
    noise = counter_rng.normals(entries.noise_keys, x0[0].numel()).to(x0).view_as(x0)
    t = (entries.phases * len(schedule)).long()
    copies = buffers.adapters[entries.rows].to(base.dtype)
    parts = [part.detach().requires_grad_() for part in copies.split(layout.widths, dim=1)]
    with base.use_adapters([buffers.frozen(entries.rows), layout.from_parts(parts)], compiled=compiled) as denoise:
        output = denoise(add_noise(schedule, x0, noise, t), schedule.times[t], context)
        losses = per_example_loss(output, target(schedule, x0, noise, t))
        if not layout.size:  # rank 0: nothing to train
            return copies.to(x0), losses.detach()
        grads = torch.autograd.grad((losses * entries.weights).sum(), parts)
    return torch.cat([part.to(x0) for part in grads], dim=1), losses.detach()


def reduce(buffers: CohortBuffers, microbatch: Microbatch, grads: Tensor, losses: Tensor) -> PassResult:
    """Sum gradients and losses by client, and clip the gradients if units are complete.

    Padding entries have gradients of zero, and their losses are excluded.

    Args:
        buffers: sums and bounds of the clients.
        microbatch: the pass.
        grads: gradients [n, D]. Overwritten.
        losses: losses [n].
    """
    counts = (microbatch.clients, microbatch.units, microbatch.entries, microbatch.unit_sizes)
    clients, units, entries, sizes = (torch.from_numpy(values).to(grads.device) for values in counts)
    per_client = sum_segments(losses[: int(microbatch.entries.sum())].double(), entries)
    if len(sizes) < microbatch.size:
        grads = sum_segments(grads, sizes)
    if microbatch.piece:
        return PassResult(clients, per_client, None, grads)
    return PassResult(clients, per_client, buffers.sums.clip(clients, grads, units), None)


def clip_unit(buffers: CohortBuffers, client: Tensor, unit: Tensor) -> ClippedGradients:
    """Clip a unit's gradient that was summed from its pieces.

    Args:
        buffers: bounds of the clients.
        client: row of the client, int64 [1].
        unit: summed gradient [1, D].
    """
    return buffers.sums.clip(client, unit, torch.ones_like(client))
