"""Compare parsed schedules with diffusers' schedulers."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from common.errors import AntherError
from models.families.schedules import parse_schedule


def config(scheduler: Any) -> dict[str, Any]:
    return {"_class_name": type(scheduler).__name__, **scheduler.config}


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        diffusers.DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
        diffusers.EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        diffusers.DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=500),
        diffusers.DDPMScheduler(trained_betas=np.linspace(0.001, 0.02, 10).tolist()),
    ],
)
def test_diffusion_matches_scheduler(scheduler: Any) -> None:
    schedule = parse_schedule(config(scheduler), tokens=16)
    assert schedule.prediction == scheduler.config.get("prediction_type", "epsilon")
    torch.testing.assert_close(schedule.signals.square(), scheduler.alphas_cumprod)
    torch.testing.assert_close(schedule.sigmas.square(), 1 - scheduler.alphas_cumprod)
    assert schedule.times.tolist() == list(range(len(scheduler.alphas_cumprod)))


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_flux_sampling_is_shifted(tokens: int, kind: str) -> None:
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    schedule = parse_schedule(config(scheduler), tokens)
    torch.testing.assert_close(schedule.sigmas, scheduler.sigmas.flip(0))  # the training table is not shifted
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 5, 5), mu=calculate_shift(tokens))
    torch.testing.assert_close(schedule.grid(5).sigmas, scheduler.sigmas)


def test_solver_flow_matches_scheduler() -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    schedule = parse_schedule(config(scheduler), tokens=16)
    plain = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    torch.testing.assert_close(schedule.sigmas, plain.sigmas.flip(0))
    plain.set_timesteps(sigmas=np.linspace(1, 1 / 5, 5))
    torch.testing.assert_close(schedule.grid(5).sigmas, plain.sigmas)


@pytest.mark.parametrize(
    ("scheduler", "match"),
    [
        (diffusers.EDMEulerScheduler(), "EDMEulerScheduler"),
        (diffusers.DDIMScheduler(prediction_type="sample"), "sample"),
    ],
)
def test_unsupported_scheduler_is_refused(scheduler: Any, match: str) -> None:
    with pytest.raises(AntherError, match=match):
        parse_schedule(config(scheduler), tokens=16)


@pytest.mark.parametrize("kind", ["FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"])
def test_flow_solvers_are_equivalent(kind: str) -> None:
    scheduler, plain = getattr(diffusers, kind)(shift=3.0), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    torch.testing.assert_close(scheduler.sigmas[: len(plain.sigmas)], plain.sigmas)
    schedule, expected = parse_schedule(config(scheduler), tokens=16), parse_schedule(config(plain), tokens=16)
    torch.testing.assert_close(schedule.sigmas, expected.sigmas)
    assert (schedule.prediction, schedule.shift) == ("flow", 3.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"shift": None},
        {"shift": "3"},
        {"shift": 0},
        {"shift": 1e9},
        {"num_train_timesteps": 1e3},
        {"use_dynamic_shifting": True, "base_image_seq_len": 4096},
        {"use_dynamic_shifting": True, "max_shift": None},
    ],
)
def test_flow_values_are_bounded(changes: dict[str, Any]) -> None:
    with pytest.raises(AntherError, match=f"{list(changes)[-1]}"):
        parse_schedule(config(diffusers.FlowMatchEulerDiscreteScheduler()) | changes, tokens=16)


def test_cosine_epsilon_is_accepted() -> None:
    """It ends with a signal of 5e-5, which is sufficient."""
    cosine = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    assert 0 < parse_schedule(config(cosine), tokens=16).signals.min() < 1e-4


def test_sd3_density_matches_diffusers() -> None:
    """The distribution function of compute_density_for_timestep_sampling, to half a percent."""
    from diffusers.training_utils import compute_density_for_timestep_sampling

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    torch.manual_seed(0)
    u = compute_density_for_timestep_sampling("logit_normal", 200_000, logit_mean=0.0, logit_std=1.0)
    reference = scheduler.sigmas[(u * scheduler.config.num_train_timesteps).long()]
    actual = parse_schedule(config(scheduler), tokens=16, logit_normal=True)
    for sigma in (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99):
        assert (actual.sigmas < sigma).float().mean().item() == pytest.approx(
            (reference < sigma).float().mean().item(), abs=5e-3
        )
    even = parse_schedule(config(scheduler), tokens=16)
    shares = [
        ((s.sigmas < 0.25).float().mean().item(), (s.sigmas > 0.95).float().mean().item()) for s in (actual, even)
    ]
    assert shares == [
        (pytest.approx(0.014, abs=2e-3), pytest.approx(0.032, abs=3e-3)),
        (pytest.approx(0.099, abs=2e-3), pytest.approx(0.137, abs=3e-3)),
    ]
    assert actual.signals.isfinite().all()
    assert 0 < actual.sigmas.min() < actual.sigmas.max() < 1
    torch.testing.assert_close(actual.grid(7), even.grid(7))  # sampling is unchanged
    places = torch.tensor([19, 499, 999])
    torch.testing.assert_close(torch.stack(actual.at(places)), torch.stack(even.at(places)))
    torch.testing.assert_close(even.at(places)[1], even.sigmas[places])


def test_only_sd3_is_logit_normal(tiny: Any) -> None:
    sigmas = tiny.base.schedule.sigmas
    assert tiny.base.family.logit_normal == (tiny.base.family.name == "sd3")
    if tiny.base.family.name == "sd3":
        assert (sigmas < 0.25).float().mean() < 0.02
