"""Compare every sampler with diffusers' scheduler, on a network that is a smooth function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)
from torch import Tensor

from common.errors import AntherError
from models.diffusion.denoiser import Denoise
from models.diffusion.objective import Schedule, diffusion, rectified_flow
from models.diffusion.sampling import SAMPLERS, num_noises, sample

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ALPHA_BARS = DDIMScheduler(**BETAS).alphas_cumprod
PREDICTIONS = ["epsilon", "v_prediction"]
FLOW = rectified_flow(1000, trained_shift=3.0, shift=3.0)


def network(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
    """Mix channels, depending on time and caption."""
    phase = t.double().view(-1, 1, 1, 1) / 1000 + context.double().mean((1, 2)).view(-1, 1, 1, 1)
    return torch.tanh(x.roll(1, 1) * (1 + phase) + 0.3 * x)


def noises(sampler: str, steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, 4, 3, 3, generator=generator, dtype=torch.float64) for _ in range(num_noises(sampler, steps))
    ]


CONTEXT = torch.linspace(-1, 1, 2 * 3 * 5, dtype=torch.float64).view(2, 3, 5)
NULL = torch.full((3, 5), 0.4, dtype=torch.float64)


def diffusers_sample(scheduler: Any, x: Tensor, guidance: float, fresh: Sequence[Tensor] = ()) -> Tensor:
    """Run all of a scheduler's steps; the noise that it adds comes from `fresh`."""
    for i, t in enumerate(scheduler.timesteps):
        time = t.expand(2)
        output = network(x, time, CONTEXT)
        plain = network(x, time, NULL.expand(2, -1, -1))
        step = scheduler.step(plain + guidance * (output - plain), t, x, return_dict=True)
        x = step.prev_sample
        if fresh and i < len(fresh):  # replace its noise
            following = scheduler.alphas_cumprod[scheduler.timesteps[i + 1]].double()
            x = following.sqrt() * step.denoised + (1 - following).sqrt() * fresh[i]
    return x


def own_sample(sampler: str, schedule: Schedule, steps: int, guidance: float) -> Tensor:
    return sample(
        sampler, network, schedule, noises(sampler, steps), CONTEXT, steps=steps, guidance=guidance, null_context=NULL
    )


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("steps", [1, 2, 4, 8, 50])  # for other numbers diffusers' DDIM misses its next step
class TestAgainstDiffusers:
    @pytest.mark.parametrize("prediction", PREDICTIONS)
    def test_ddim(self, prediction: str, steps: int, guidance: float) -> None:
        scheduler = DDIMScheduler(
            **BETAS, prediction_type=prediction, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
        )
        scheduler.set_timesteps(steps)
        actual = own_sample("ddim", diffusion(ALPHA_BARS, prediction), steps, guidance)
        expected = diffusers_sample(scheduler, noises("ddim", steps)[0], guidance)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("prediction", PREDICTIONS)
    def test_dpm_solver(self, prediction: str, steps: int, guidance: float) -> None:
        scheduler = DPMSolverMultistepScheduler(**BETAS, prediction_type=prediction, timestep_spacing="trailing")
        scheduler.set_timesteps(steps)
        actual = own_sample("dpm", diffusion(ALPHA_BARS, prediction), steps, guidance)
        expected = diffusers_sample(scheduler, noises("dpm", steps)[0], guidance)
        torch.testing.assert_close(actual.float(), expected.float(), rtol=1e-3, atol=1e-3)

    def test_flow_solver(self, steps: int, guidance: float) -> None:
        """By default it uses other steps."""
        scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
        scheduler.set_timesteps(steps)
        grid = FLOW.grid(steps)
        scheduler.sigmas, scheduler.timesteps = grid.sigmas, grid.times
        expected = diffusers_sample(scheduler, noises("dpm", steps)[0], guidance)
        torch.testing.assert_close(
            own_sample("dpm", FLOW, steps, guidance).float(), expected.float(), rtol=1e-3, atol=1e-3
        )

    def test_flow_euler(self, steps: int, guidance: float) -> None:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
        expected = diffusers_sample(scheduler, noises("ddim", steps)[0], guidance)
        torch.testing.assert_close(own_sample("ddim", FLOW, steps, guidance), expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("prediction", PREDICTIONS)
    def test_lcm(self, prediction: str, steps: int, guidance: float) -> None:
        scheduler = LCMScheduler(**BETAS, prediction_type=prediction)
        scheduler.set_timesteps(steps)
        start, *fresh = noises("lcm", steps)
        expected = diffusers_sample(scheduler, start, guidance, fresh)
        actual = own_sample("lcm", diffusion(ALPHA_BARS, prediction), steps, guidance)
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("prediction", PREDICTIONS)
    def test_ancestral(self, prediction: str, steps: int, guidance: float, monkeypatch: pytest.MonkeyPatch) -> None:
        """diffusers' version works on x / a, and draws its own noise, also after the last step, with weight zero."""
        scheduler = EulerAncestralDiscreteScheduler(**BETAS, prediction_type=prediction, timestep_spacing="trailing")
        scheduler.set_timesteps(steps)
        schedule = diffusion(ALPHA_BARS, prediction)
        start, *fresh = noises("ancestral", steps)
        waiting = iter([*fresh, torch.zeros_like(start)])
        where = "diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor"
        monkeypatch.setattr(where, lambda *_, **__: next(waiting))
        x = start / schedule.grid(steps).signals[0]
        for t in scheduler.timesteps:
            seen, time = scheduler.scale_model_input(x, t), t.expand(2)
            output = network(seen, time, CONTEXT)
            plain = network(seen, time, NULL.expand(2, -1, -1))
            x = scheduler.step(plain + guidance * (output - plain), t, x).prev_sample
        actual = own_sample("ancestral", schedule, steps, guidance)
        torch.testing.assert_close(actual.float(), x.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guide_makes_the_unconditional_prediction(sampler: str) -> None:
    """A guide equal to the network changes nothing; guidance by another removes its prediction."""
    schedule, start = diffusion(ALPHA_BARS, "v_prediction"), noises(sampler, 4)

    def drawn(guidance: float, guide: Denoise | None) -> Tensor:
        return sample(
            sampler, network, schedule, start, CONTEXT, steps=4, guidance=guidance, null_context=NULL, guide=guide
        )

    def offset(x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        return network(x, time, context) - 0.1

    def expected(x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        plain = network(x, time, NULL.expand(2, -1, -1))
        return plain + 2.5 * (network(x, time, context) - plain) + 1.5 * 0.1

    torch.testing.assert_close(drawn(2.5, network), drawn(2.5, None))
    torch.testing.assert_close(drawn(1.0, offset), drawn(1.0, None))
    manual = sample(sampler, expected, schedule, start, CONTEXT, steps=4)
    torch.testing.assert_close(drawn(2.5, offset), manual)


@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
def test_convergence_order(sampler: str) -> None:
    """Errors relative to very many steps decrease at least as fast as the order: by half, or to a quarter."""
    schedule = diffusion(ALPHA_BARS, "v_prediction")
    exact = own_sample("ddim", schedule, 1000, 1.0)
    coarse, fine = ((own_sample(sampler, schedule, steps, 1.0) - exact).norm() for steps in (25, 100))
    assert fine < coarse / {"ddim": 2, "dpm": 4}[sampler]


def test_straight_flow_needs_one_step() -> None:
    """ε − x_0 is constant along a straight path."""
    x0, noise = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    for sampler in ("ddim", "dpm"):
        for steps in (1, 3):
            actual = sample(sampler, lambda x, t, c: noise - x0, FLOW, [noise], CONTEXT, steps=steps)  # noqa: ARG005
            torch.testing.assert_close(actual, x0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_images_are_sampled_independently(sampler: str) -> None:
    schedule = diffusion(ALPHA_BARS, "epsilon")
    whole = own_sample(sampler, schedule, 3, 2.5)
    for row in (slice(0, 1), slice(1, 2)):
        single = sample(
            sampler,
            network,
            schedule,
            [noise[row] for noise in noises(sampler, 3)],
            CONTEXT[row],
            steps=3,
            guidance=2.5,
            null_context=NULL,
        )
        torch.testing.assert_close(single, whole[row])


@pytest.mark.parametrize("steps", [0, 51])
def test_lcm_refuses_invalid_steps(steps: int) -> None:
    with pytest.raises(AntherError, match="1 to 50"):
        own_sample("lcm", diffusion(ALPHA_BARS, "epsilon"), steps, 1.0)
