import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from common.errors import AntherError
from models.diffusion.objective import (
    add_noise,
    diffusion,
    per_example_loss,
    predict_x0_and_noise,
    rectified_flow,
    target,
)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_diffusion_matches_diffusers(prediction: str) -> None:
    scheduler = DDIMScheduler(prediction_type=prediction)
    schedule = diffusion(scheduler.alphas_cumprod, prediction)
    x0, noise, t = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0, 500, 999])
    torch.testing.assert_close(add_noise(schedule, x0, noise, t), scheduler.add_noise(x0, noise, t))
    expected = noise if prediction == "epsilon" else scheduler.get_velocity(x0, noise, t)
    torch.testing.assert_close(target(schedule, x0, noise, t), expected)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matches_diffusers(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = rectified_flow(1000, trained_shift=shift, shift=shift)
    torch.testing.assert_close(schedule.sigmas, scheduler.sigmas.flip(0))
    torch.testing.assert_close(schedule.times, scheduler.timesteps.flip(0))
    x0, noise, t = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0, 500, 999])
    expected = scheduler.scale_noise(x0, scheduler.timesteps[999 - t], noise)
    torch.testing.assert_close(add_noise(schedule, x0, noise, t), expected)
    slightly = 1e-3
    ahead = (1 - schedule.sigmas[t] - slightly).view(-1, 1, 1, 1) * x0 + (schedule.sigmas[t] + slightly).view(
        -1, 1, 1, 1
    ) * noise  # the target is dx_t/dσ
    torch.testing.assert_close(target(schedule, x0, noise, t), (ahead - expected) / slightly, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("steps", [1, 3, 4, 7])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_grid_matches_diffusers(steps: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    signals, sigmas, times = rectified_flow(1000, trained_shift=shift, shift=shift).grid(steps)
    torch.testing.assert_close(sigmas, scheduler.sigmas)
    torch.testing.assert_close(times, scheduler.timesteps)
    torch.testing.assert_close(signals, 1 - sigmas)


@pytest.mark.parametrize("steps", [1, 3, 4, 50, 1000])
def test_diffusion_grid_matches_diffusers(steps: int) -> None:
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    signals, sigmas, times = diffusion(scheduler.alphas_cumprod, "epsilon").grid(steps)
    assert times.tolist() == scheduler.timesteps.tolist()
    torch.testing.assert_close(signals[:-1].square(), scheduler.alphas_cumprod[scheduler.timesteps])
    assert (float(signals[-1]), float(sigmas[-1])) == (1, 0)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
def test_target_yields_x0_and_noise(prediction: str) -> None:
    alpha_bars = torch.linspace(0.999, 0.01, 10)
    schedule = rectified_flow(11, trained_shift=2.0, shift=2.0)
    if prediction != "flow":
        schedule = diffusion(alpha_bars, prediction)
    x0, noise, t = torch.randn(10, 4, 2, 2), torch.randn(10, 4, 2, 2), torch.arange(10)
    x, output = add_noise(schedule, x0, noise, t), target(schedule, x0, noise, t)
    actual = predict_x0_and_noise(schedule, x, output, *schedule.rates(t))
    for one, other in zip(actual, (x0, noise), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_unknown_prediction_is_refused() -> None:
    with pytest.raises(AntherError, match="sample"):
        diffusion(torch.ones(1), "sample")


def test_loss_is_per_example() -> None:
    a, b = np.random.rand(3, 4, 2, 2), np.random.rand(3, 4, 2, 2)
    expected = ((a - b) ** 2).reshape(3, -1).mean(1)
    actual = per_example_loss(torch.tensor(a).float(), torch.tensor(b).float())
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-5)


def test_loss_uses_target_precision() -> None:
    """A mean of squares in bfloat16 would have two digits."""
    expected = torch.randn(2, 4, 8, 8)
    prediction = (expected + 1e-2).bfloat16()
    actual = per_example_loss(prediction, expected)
    assert actual.dtype == torch.float32
    truth = (prediction.double() - expected.double()).square().flatten(1).mean(1)
    torch.testing.assert_close(actual.double(), truth, rtol=1e-5, atol=0)
    assert per_example_loss(prediction, expected.double()).dtype == torch.float64


def test_schedule_moves_to_device() -> None:
    schedule = diffusion(torch.linspace(1, 0, 7), "epsilon")
    moved = schedule.to(torch.device("cpu"))
    assert len(moved) == 7
    assert moved.prediction == "epsilon"
    assert torch.equal(moved.signals, schedule.signals)
    reference = schedule.to(torch.device("meta"))
    assert all(values.is_meta for values in (reference.signals, reference.sigmas, reference.times))


def test_schedule_preserves_variance() -> None:
    schedule = diffusion(torch.linspace(1, 0, 7), "epsilon")
    signal, sigma = schedule.rates(torch.arange(7))
    assert signal.shape == (7, 1, 1, 1)
    torch.testing.assert_close(signal.square() + sigma.square(), torch.ones(7, 1, 1, 1))
    x0, noise, t = torch.randn(7, 4, 2, 2), torch.randn(7, 4, 2, 2), torch.arange(7)
    actual = add_noise(schedule, x0, noise, t)
    assert torch.equal(actual[0], x0[0])  # ᾱ = 1
    assert torch.equal(actual[6], noise[6])  # ᾱ = 0
