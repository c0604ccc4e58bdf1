"""Deterministic DDIM as a pure function.

Implements eq. 12 of Song et al. (2021, arXiv:2010.02502) with σ = 0, and classifier-free guidance
(Ho & Salimans, 2022, arXiv:2207.12598, eq. 6) on the network's output.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from models.denoiser import Denoise
from models.objective import Schedule


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
    """x_0 [N, c, h, w] from noise x, in `steps` evenly spaced steps that start at the last timestep.

    `null_context` [l, d] is the empty caption's embedding, needed when `guidance` is not 1.
    """
    times = torch.linspace(len(schedule) - 1, 0, steps + 1).round().long()
    for now, after in pairwise(times):
        t = now.expand(len(x)).to(x.device)
        output = denoise(x, t, context)
        if guidance != 1.0:
            assert null_context is not None, "guidance needs the empty caption's embedding"
            plain = denoise(x, t, null_context.expand(len(x), -1, -1))
            output = plain + guidance * (output - plain)
        signal, sigma = schedule.rates(t)
        if schedule.prediction == "v_prediction":
            x0, noise = signal * x - sigma * output, sigma * x + signal * output
        else:
            x0, noise = (x - sigma * output) / signal, output
        signal, sigma = schedule.rates(after.expand(len(x)).to(x.device))
        x = x0 if after == 0 else signal * x0 + sigma * noise
    return x
