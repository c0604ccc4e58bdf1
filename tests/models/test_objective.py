import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import AntherError
from models.objective import Schedule, noised, per_example_loss, stratified_timesteps, target


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


@given(count=st.integers(1, 9), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_one_timestep_in_each_stratum(count: int, seed: int) -> None:
    t = stratified_timesteps(count, 1000, torch.Generator().manual_seed(seed))
    assert ((t >= 0) & (t < 1000)).all()
    gaps = torch.diff(torch.cat([t.sort().values, t.min()[None] + 1000]))
    assert (gaps - 1000 / count).abs().max() <= 1 + 1e-6


def test_a_stratified_timestep_is_uniform() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.stack([stratified_timesteps(4, 10, generator)[0] for _ in range(4000)])
    assert (torch.bincount(first, minlength=10) / 4000 - 0.1).abs().max() < 0.025
