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
def test_forward_process_and_target_are_those_of_diffusers(prediction: str) -> None:
    scheduler = DDIMScheduler(prediction_type=prediction)
    schedule = diffusion(scheduler.alphas_cumprod, prediction)
    x0, noise, t = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0, 500, 999])
    torch.testing.assert_close(add_noise(schedule, x0, noise, t), scheduler.add_noise(x0, noise, t))
    wanted = noise if prediction == "epsilon" else scheduler.get_velocity(x0, noise, t)
    torch.testing.assert_close(target(schedule, x0, noise, t), wanted)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_and_its_target_are_those_of_diffusers(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = rectified_flow(1000, trained_shift=shift, shift=shift)
    torch.testing.assert_close(schedule.sigmas, scheduler.sigmas.flip(0))
    torch.testing.assert_close(schedule.times, scheduler.timesteps.flip(0))
    x0, noise, t = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0, 500, 999])
    wanted = scheduler.scale_noise(x0, scheduler.timesteps[999 - t], noise)
    torch.testing.assert_close(add_noise(schedule, x0, noise, t), wanted)
    slightly = 1e-3
    ahead = (1 - schedule.sigmas[t] - slightly).view(-1, 1, 1, 1) * x0 + (schedule.sigmas[t] + slightly).view(
        -1, 1, 1, 1
    ) * noise  # the target is how x_t moves with σ
    torch.testing.assert_close(target(schedule, x0, noise, t), (ahead - wanted) / slightly, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("steps", [1, 3, 4, 7])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_is_drawn_through_the_places_of_diffusers(steps: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    signals, sigmas, times = rectified_flow(1000, trained_shift=shift, shift=shift).grid(steps)
    torch.testing.assert_close(sigmas, scheduler.sigmas)
    torch.testing.assert_close(times, scheduler.timesteps)
    torch.testing.assert_close(signals, 1 - sigmas)


@pytest.mark.parametrize("steps", [1, 3, 4, 50, 1000])
def test_a_diffusion_is_drawn_through_the_places_of_diffusers(steps: int) -> None:
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    signals, sigmas, times = diffusion(scheduler.alphas_cumprod, "epsilon").grid(steps)
    assert times.tolist() == scheduler.timesteps.tolist()
    torch.testing.assert_close(signals[:-1].square(), scheduler.alphas_cumprod[scheduler.timesteps])
    assert (float(signals[-1]), float(sigmas[-1])) == (1, 0)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
def test_the_target_stands_for_the_picture_and_the_noise(prediction: str) -> None:
    alpha_bars = torch.linspace(0.999, 0.01, 10)
    schedule = rectified_flow(11, trained_shift=2.0, shift=2.0)
    if prediction != "flow":
        schedule = diffusion(alpha_bars, prediction)
    x0, noise, t = torch.randn(10, 4, 2, 2), torch.randn(10, 4, 2, 2), torch.arange(10)
    x, output = add_noise(schedule, x0, noise, t), target(schedule, x0, noise, t)
    found = predict_x0_and_noise(schedule, x, output, *schedule.rates(t))
    for one, other in zip(found, (x0, noise), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_unknown_prediction_is_refused() -> None:
    with pytest.raises(AntherError, match="sample"):
        diffusion(torch.ones(1), "sample")


def test_loss_is_per_example() -> None:
    a, b = np.random.rand(3, 4, 2, 2), np.random.rand(3, 4, 2, 2)
    wanted = ((a - b) ** 2).reshape(3, -1).mean(1)
    found = per_example_loss(torch.tensor(a).float(), torch.tensor(b).float())
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-5)


def test_loss_has_the_precision_of_the_target() -> None:
    """A mean of squares in bfloat16 would keep two digits."""
    wanted = torch.randn(2, 4, 8, 8)
    prediction = (wanted + 1e-2).bfloat16()
    found = per_example_loss(prediction, wanted)
    assert found.dtype == torch.float32
    truth = (prediction.double() - wanted.double()).square().flatten(1).mean(1)
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=0)
    assert per_example_loss(prediction, wanted.double()).dtype == torch.float64


def test_a_schedule_moves_to_a_device_whole() -> None:
    schedule = diffusion(torch.linspace(1, 0, 7), "epsilon")
    moved = schedule.to(torch.device("cpu"))
    assert len(moved) == 7
    assert moved.prediction == "epsilon"
    assert torch.equal(moved.signals, schedule.signals)
    there = schedule.to(torch.device("meta"))
    assert all(values.is_meta for values in (there.signals, there.sigmas, there.times))


def test_signal_and_noise_together_have_variance_one() -> None:
    schedule = diffusion(torch.linspace(1, 0, 7), "epsilon")
    signal, sigma = schedule.rates(torch.arange(7))
    assert signal.shape == (7, 1, 1, 1)
    torch.testing.assert_close(signal.square() + sigma.square(), torch.ones(7, 1, 1, 1))
    x0, noise, t = torch.randn(7, 4, 2, 2), torch.randn(7, 4, 2, 2), torch.arange(7)
    found = add_noise(schedule, x0, noise, t)
    assert torch.equal(found[0], x0[0])  # ᾱ = 1
    assert torch.equal(found[6], noise[6])  # ᾱ = 0
