import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from conf.errors import AntherError
from models.objective import Schedule, noised, per_example_loss, target


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_forward_process_and_target_are_those_of_diffusers(prediction: str) -> None:
    scheduler = DDIMScheduler(prediction_type=prediction)
    schedule = Schedule(scheduler.alphas_cumprod, prediction)
    x0, noise, t = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0, 500, 999])
    torch.testing.assert_close(noised(schedule, x0, noise, t), scheduler.add_noise(x0, noise, t))
    wanted = noise if prediction == "epsilon" else scheduler.get_velocity(x0, noise, t)
    torch.testing.assert_close(target(schedule, x0, noise, t), wanted)


def test_unknown_prediction_is_refused() -> None:
    with pytest.raises(AntherError, match="sample"):
        Schedule(torch.ones(1), "sample")


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
    schedule = Schedule(torch.linspace(1, 0, 7), "epsilon")
    moved = schedule.to(torch.device("cpu"))
    assert len(moved) == 7
    assert moved.prediction == "epsilon"
    assert torch.equal(moved.alpha_bars, schedule.alpha_bars)
    assert Schedule(torch.linspace(1, 0, 7), "epsilon").to(torch.device("meta")).alpha_bars.is_meta


def test_signal_and_noise_together_have_variance_one() -> None:
    schedule = Schedule(torch.linspace(1, 0, 7), "epsilon")
    signal, sigma = schedule.rates(torch.arange(7))
    assert signal.shape == (7, 1, 1, 1)
    torch.testing.assert_close(signal.square() + sigma.square(), torch.ones(7, 1, 1, 1))
    x0, noise, t = torch.randn(7, 4, 2, 2), torch.randn(7, 4, 2, 2), torch.arange(7)
    found = noised(schedule, x0, noise, t)
    assert torch.equal(found[0], x0[0])  # ᾱ = 1
    assert torch.equal(found[6], noise[6])  # ᾱ = 0
