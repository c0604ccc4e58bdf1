"""Sampling as pure functions, for diffusions and rectified flows alike.

Each takes x [N, c, h, w] from pure noise to x_0, through `steps` places of the schedule. Classifier-free guidance is
eq. 6 of Ho & Salimans (2022, arXiv:2207.12598), on the network's output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from common.errors import AntherError
from models.base.denoiser import Denoise
from models.diffusion.objective import Schedule, predict_x0_and_noise

SAMPLERS = ("ddim", "dpm", "lcm", "ancestral")

_ORIGINS = 50  # places of a schedule that consistency distillation uses


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
) -> Tensor:
    """x_0 [N, c, h, w] from noise, by one of `SAMPLERS`.

    Args:
        noises: of `num_noises(sampler, steps)` tensors [N, c, h, w], the first to start from.
        null_context: [l, d], what stands for no caption; needed when `guidance` is not 1.
    """

    def guided(x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        output = denoise(x, time, context)
        if guidance == 1.0:
            return output
        assert null_context is not None, "guidance needs what stands for no caption"
        plain = denoise(x, time, null_context.expand(len(x), -1, -1))
        return plain + guidance * (output - plain)

    if sampler in _RANDOM:
        return _RANDOM[sampler](guided, schedule, noises, context, steps=steps)
    return {"ddim": ddim, "dpm": dpm_solver}[sampler](guided, schedule, noises[0], context, steps=steps)


def num_noises(sampler: str, steps: int) -> int:
    """How many noises a sampler uses."""
    return steps if sampler in _RANDOM else 1


def ddim(denoise: Denoise, schedule: Schedule, x: Tensor, context: Tensor, *, steps: int) -> Tensor:
    """Eq. 12 of Song et al. (2021, arXiv:2010.02502) with σ = 0; of a rectified flow the same step is Euler's."""
    signals, sigmas, times = (values.to(x.device) for values in schedule.grid(steps))
    for place, time in enumerate(times):
        output = denoise(x, time.expand(len(x)), context)
        x0, noise = predict_x0_and_noise(schedule, x, output, signals[place], sigmas[place])
        x = signals[place + 1] * x0 + sigmas[place + 1] * noise
    return x


def dpm_solver(denoise: Denoise, schedule: Schedule, x: Tensor, context: Tensor, *, steps: int) -> Tensor:
    """DPM-Solver++(2M), algorithm 2 of Lu et al. (2022, arXiv:2211.01095).

    h is a step in λ = log(a / σ). The first step is of first order, and the last too, since it ends at λ = ∞.
    """
    signals, sigmas, times = (values.to(x.device) for values in schedule.grid(steps))
    lambdas = signals.log() - sigmas.log()
    before = None
    for place, time in enumerate(times):
        output = denoise(x, time.expand(len(x)), context)
        x0, _ = predict_x0_and_noise(schedule, x, output, signals[place], sigmas[place])
        h, d = lambdas[place + 1] - lambdas[place], x0
        if before is not None and place < steps - 1:
            r = (lambdas[place] - lambdas[place - 1]) / h
            d = x0 + (x0 - before) / (2 * r)
        x = sigmas[place + 1] / sigmas[place] * x - signals[place + 1] * torch.expm1(-h) * d
        before = x0
    return x


def lcm(denoise: Denoise, schedule: Schedule, noises: Sequence[Tensor], context: Tensor, *, steps: int) -> Tensor:
    """Multistep consistency sampling, algorithm 3 of Luo et al. (2023, arXiv:2310.04378): guess x_0, noise it again.

    For networks that were distilled to guess it in one step, or under an adapter that makes them so; the places are
    those of the 50 that distillation uses. Its scalings c_skip and c_out are 0 and 1 there, to 1e-5.

    Args:
        noises: one for each step, the first to start from.

    Raises:
        AntherError: more steps than there are places.
    """
    if not 1 <= steps <= _ORIGINS or len(schedule) < _ORIGINS:
        raise AntherError(f"steps={steps}: lcm takes 1 to {_ORIGINS}, on a schedule of {_ORIGINS} places and more")
    origins = torch.arange(1, _ORIGINS + 1) * (len(schedule) // _ORIGINS) - 1
    chosen = origins.flip(0)[torch.linspace(0, _ORIGINS, steps + 1, dtype=torch.float64)[:-1].long()]
    x0 = noises[0]
    grid = zip(*schedule.at(chosen.to(x0.device)), noises, strict=True)
    for place, (signal, sigma, time, noise) in enumerate(grid):
        x = signal * x0 + sigma * noise if place else noise
        x0, _ = predict_x0_and_noise(schedule, x, denoise(x, time.expand(len(x)), context), signal, sigma)
    return x0


def ancestral(denoise: Denoise, schedule: Schedule, noises: Sequence[Tensor], context: Tensor, *, steps: int) -> Tensor:
    """DDIM with η = 1 (Song et al., 2021, eq. 12 and 16), which in σ/a is Euler's ancestral step.

    What networks of adversarial distillation are drawn with, SD-Turbo and SDXL-Turbo, in 1 to 4 steps (Sauer et al.,
    2023, arXiv:2311.17042).

    Args:
        noises: one for each step, the first to start from.
    """
    x = noises[0]
    signals, sigmas, times = (values.to(x.device) for values in schedule.grid(steps))
    ratios = sigmas / signals
    for place, time in enumerate(times):
        output = denoise(x, time.expand(len(x)), context)
        x0, noise = predict_x0_and_noise(schedule, x, output, signals[place], sigmas[place])
        if place == steps - 1:
            return x0
        kept = ratios[place + 1] / ratios[place]
        mixed = kept * noise + (1 - kept.square()).sqrt() * noises[place + 1]
        x = signals[place + 1] * x0 + sigmas[place + 1] * mixed
    return x


_RANDOM = {"lcm": lcm, "ancestral": ancestral}
