"""Samplers as pure functions, for diffusions and rectified flows.

Each maps pure noise x [N, c, h, w] to x_0 in `steps` steps of the schedule. Classifier-free guidance is eq. 6 of Ho &
Salimans (2022, arXiv:2207.12598), applied to the network's output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from common.errors import AntherError
from models.diffusion.denoiser import Denoise
from models.diffusion.objective import Schedule, predict_x0_and_noise

SAMPLERS = ("ddim", "dpm", "lcm", "ancestral")

_ORIGINS = 50  # steps of a schedule that consistency distillation uses


@torch.no_grad()
def sample(
    sampler: str,
    denoise: Denoise,
    schedule: Schedule,
    noises: Sequence[Tensor],
    context: Tensor,
    *,
    steps: int,
    guidance: float = 1.0,
    null_context: Tensor | None = None,
    guide: Denoise | None = None,
) -> Tensor:
    """Sample x_0 from noise.

    With a `guide`, that weaker network makes the unconditional prediction: guidance then strengthens the caption, and
    whatever else the network has learned and the guide has not (Karras et al., 2024, arXiv:2406.02507).

    Args:
        sampler: one of `SAMPLERS`.
        denoise: the network.
        schedule: its forward process.
        noises: `num_noises(sampler, steps)` tensors [N, c, h, w]; the first is the initial noise.
        context: [N, rows, d].
        steps: network evaluations, without guidance.
        guidance: scale of classifier-free guidance; 1 is none.
        null_context: unconditional context [rows, d]; required unless `guidance` is 1.
        guide: network of the unconditional prediction; None: `denoise`.

    Returns:
        x_0 [N, c, h, w].
    """

    def guided(x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        output = denoise(x, time, context)
        if guidance == 1.0:
            return output
        assert null_context is not None, "guidance requires null_context"
        unconditional = (guide or denoise)(x, time, null_context.expand(len(x), -1, -1))
        return unconditional + guidance * (output - unconditional)

    if sampler in _RANDOM:
        return _RANDOM[sampler](guided, schedule, noises, context, steps=steps)
    return {"ddim": ddim, "dpm": dpm_solver}[sampler](guided, schedule, noises[0], context, steps=steps)


def num_noises(sampler: str, steps: int) -> int:
    """Return the number of noise tensors that a sampler uses."""
    return steps if sampler in _RANDOM else 1


def ddim(denoise: Denoise, schedule: Schedule, x: Tensor, context: Tensor, *, steps: int) -> Tensor:
    """DDIM: eq. 12 of Song et al. (2021, arXiv:2010.02502) with σ = 0; for a rectified flow this is Euler's step.

    Args:
        denoise: the network.
        schedule: its forward process.
        x: initial noise [N, c, h, w].
        context: [N, rows, d].
        steps: network evaluations.

    Returns:
        x_0 [N, c, h, w].
    """
    signals, sigmas, times = (values.to(x.device) for values in schedule.grid(steps))
    for i, time in enumerate(times):
        output = denoise(x, time.expand(len(x)), context)
        x0, noise = predict_x0_and_noise(schedule, x, output, signals[i], sigmas[i])
        x = signals[i + 1] * x0 + sigmas[i + 1] * noise
    return x


def dpm_solver(denoise: Denoise, schedule: Schedule, x: Tensor, context: Tensor, *, steps: int) -> Tensor:
    """DPM-Solver++(2M), algorithm 2 of Lu et al. (2022, arXiv:2211.01095).

    h is a step in λ = log(a / σ). The first step is of first order, and so is the last, which ends at λ = ∞.

    Args:
        denoise: the network.
        schedule: its forward process.
        x: initial noise [N, c, h, w].
        context: [N, rows, d].
        steps: network evaluations.

    Returns:
        x_0 [N, c, h, w].
    """
    signals, sigmas, times = (values.to(x.device) for values in schedule.grid(steps))
    lambdas = signals.log() - sigmas.log()
    previous = None
    for i, time in enumerate(times):
        output = denoise(x, time.expand(len(x)), context)
        x0, _ = predict_x0_and_noise(schedule, x, output, signals[i], sigmas[i])
        h, d = lambdas[i + 1] - lambdas[i], x0
        if previous is not None and i < steps - 1:
            r = (lambdas[i] - lambdas[i - 1]) / h
            d = x0 + (x0 - previous) / (2 * r)
        x = sigmas[i + 1] / sigmas[i] * x - signals[i + 1] * torch.expm1(-h) * d
        previous = x0
    return x


def lcm(denoise: Denoise, schedule: Schedule, noises: Sequence[Tensor], context: Tensor, *, steps: int) -> Tensor:
    """Multistep consistency sampling, algorithm 3 of Luo et al. (2023, arXiv:2310.04378): predict x_0, add noise again.

    For networks that were distilled to predict x_0 in one step, or with an adapter that makes them do so. The steps are
    taken from the 50 that distillation uses. The scalings c_skip and c_out are 0 and 1 there, to 1e-5.

    Args:
        denoise: the network.
        schedule: its forward process.
        noises: one [N, c, h, w] per step; the first is the initial noise.
        context: [N, rows, d].
        steps: network evaluations.

    Returns:
        x_0 [N, c, h, w].

    Raises:
        AntherError: `steps` exceeds the 50 steps of distillation, or the schedule is shorter.
    """
    if not 1 <= steps <= _ORIGINS or len(schedule) < _ORIGINS:
        raise AntherError(f"steps={steps}: lcm takes 1 to {_ORIGINS} steps, of a schedule of at least {_ORIGINS}")
    origins = torch.arange(1, _ORIGINS + 1) * (len(schedule) // _ORIGINS) - 1
    selected = origins.flip(0)[torch.linspace(0, _ORIGINS, steps + 1, dtype=torch.float64)[:-1].long()]
    x0 = noises[0]
    grid = zip(*schedule.at(selected.to(x0.device)), noises, strict=True)
    for i, (signal, sigma, time, noise) in enumerate(grid):
        x = signal * x0 + sigma * noise if i else noise
        x0, _ = predict_x0_and_noise(schedule, x, denoise(x, time.expand(len(x)), context), signal, sigma)
    return x0


def ancestral(denoise: Denoise, schedule: Schedule, noises: Sequence[Tensor], context: Tensor, *, steps: int) -> Tensor:
    """DDIM with η = 1 (Song et al., 2021, eq. 12 and 16), which in σ/a is Euler's ancestral step.

    The sampler of adversarially distilled networks, SD-Turbo and SDXL-Turbo, in 1 to 4 steps (Sauer et al., 2023,
    arXiv:2311.17042).

    Args:
        denoise: the network.
        schedule: its forward process.
        noises: one [N, c, h, w] per step; the first is the initial noise.
        context: [N, rows, d].
        steps: network evaluations.

    Returns:
        x_0 [N, c, h, w].
    """
    x = noises[0]
    signals, sigmas, times = (values.to(x.device) for values in schedule.grid(steps))
    ratios = sigmas / signals
    for i, time in enumerate(times):
        output = denoise(x, time.expand(len(x)), context)
        x0, noise = predict_x0_and_noise(schedule, x, output, signals[i], sigmas[i])
        if i == steps - 1:
            return x0
        retained = ratios[i + 1] / ratios[i]
        mixed = retained * noise + (1 - retained.square()).sqrt() * noises[i + 1]
        x = signals[i + 1] * x0 + sigmas[i + 1] * mixed
    return x


_RANDOM = {"lcm": lcm, "ancestral": ancestral}
