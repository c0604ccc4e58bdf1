"""Deterministic sampling as pure functions.

DDIM is eq. 12 of Song et al. (2021, arXiv:2010.02502) with σ = 0; of a rectified flow the same step is Euler's.
Classifier-free guidance is eq. 6 of Ho & Salimans (2022, arXiv:2207.12598), on the network's output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.denoiser import Denoise
from models.objective import Schedule, ends


@torch.no_grad()
def ddim(
    denoise: Denoise,
    schedule: Schedule,
    x: Tensor,
    context: Tensor,
    *,
    steps: int,
    guidance: float = 1.0,
    null_context: Tensor | None = None,
) -> Tensor:
    """x_0 [N, c, h, w] from noise x, through the schedule's grid of `steps` places.

    `null_context` [l, d] is what stands for no caption, needed when `guidance` is not 1.
    """
    signals, sigmas, times = (values.to(x.device) for values in schedule.grid(steps))
    for place, time in enumerate(times):
        output = _guided(denoise, x, time.expand(len(x)), context, guidance, null_context)
        x0, noise = ends(schedule, x, output, signals[place], sigmas[place])
        x = signals[place + 1] * x0 + sigmas[place + 1] * noise
    return x


def _guided(
    denoise: Denoise, x: Tensor, time: Tensor, context: Tensor, guidance: float, null_context: Tensor | None
) -> Tensor:
    """The network's output [N, c, h, w], led away from what it is without a caption."""
    output = denoise(x, time, context)
    if guidance == 1.0:
        return output
    assert null_context is not None, "guidance needs what stands for no caption"
    plain = denoise(x, time, null_context.expand(len(x), -1, -1))
    return plain + guidance * (output - plain)
