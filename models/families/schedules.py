"""The forward process that a checkpoint was trained with, from its scheduler's own configuration.

Flows are trained on the σ of the scheduler's table, as shifted there. SD3 draws the middle more often besides, by a
logit-normal density (Esser et al., 2024, arXiv:2403.03206, §3.1), as its makers and diffusers' scripts do: 1.4 % of its
places have σ under 0.25 and 3.2 % over 0.95, where even places had 10 and 14 %. Flux and Sana draw all alike often, as
diffusers' scripts do. Where pictures are drawn through σ that are shifted by their size, the table isn't shifted, as it
isn't in that scheduler itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from common.errors import AntherError, shown
from models.diffusion.objective import Schedule, diffusion, rectified_flow

_BETAS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)
_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
_FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
_LONGEST = 10_000  # places: the largest published schedule has 1,000
_LEAST = 1e-6  # of the picture's share at the end of a schedule, for ε to say anything about it


def parse_schedule(config: Mapping[str, Any], tokens: int, *, logit_normal: bool = False) -> Schedule:
    """The schedule that a `scheduler_config.json` describes, for latents of so many tokens.

    Args:
        logit_normal: of a flow, train the middle more often.

    Raises:
        AntherError: it is neither a discrete diffusion nor a rectified flow, or has values that no scheduler takes.
    """
    name = config.get("_class_name")
    length = config.get("num_train_timesteps", 1000)
    if isinstance(length, bool) or not isinstance(length, int) or not 1 <= length <= _LONGEST:
        raise AntherError(
            f"scheduler {shown(name)}: num_train_timesteps={shown(length)}: must be a whole number, 1 to {_LONGEST}"
        )
    if name in _FLOWS:
        if config.get("use_dynamic_shifting"):
            shift = _dynamic_shift(config, tokens)
            return rectified_flow(length, trained_shift=1.0, shift=shift, logit_normal=logit_normal)
        shift = _number(config, "shift", 1.0)
        return rectified_flow(length, trained_shift=shift, shift=shift, logit_normal=logit_normal)
    prediction = config.get("prediction_type", "epsilon")
    if config.get("use_flow_sigmas") or prediction == "flow_prediction":
        shift = _number({**config, "flow_shift": config.get("flow_shift") or 1.0}, "flow_shift", 1.0)
        return rectified_flow(length, trained_shift=shift, shift=shift, logit_normal=logit_normal)
    if "beta_start" not in config:
        raise AntherError(f"scheduler {shown(name)}: neither a diffusion with betas nor a rectified flow")
    if config.get("trained_betas") is None:
        for key in ("beta_start", "beta_end"):
            _number(config, key, 0.01, most=1.0)
        if (kind := config.get("beta_schedule", "linear")) not in _BETA_SCHEDULES:
            raise AntherError(
                f"scheduler {shown(name)}: beta_schedule={shown(kind)}: only {', '.join(_BETA_SCHEDULES)} are supported"
            )
    else:
        _check_betas(name, config["trained_betas"])
    from diffusers import DDIMScheduler  # slow import, so only here

    scheduler: Any = DDIMScheduler(**{key: config[key] for key in _BETAS if key in config})
    least = float(scheduler.alphas_cumprod.min()) ** 0.5
    if prediction == "epsilon" and not least >= _LEAST:
        raise AntherError(
            f"scheduler {shown(name)}: prediction_type=epsilon where nothing is left of a picture "
            "(rescale_betas_zero_snr): such bases predict v; set prediction_type=v_prediction if this one does"
        )
    return diffusion(scheduler.alphas_cumprod, prediction)


def _check_betas(name: Any, betas: Any) -> None:
    sound = isinstance(betas, list) and 1 <= len(betas) <= _LONGEST
    if not sound or not all(isinstance(beta, float) and 0 < beta < 1 for beta in betas):
        raise AntherError(f"scheduler {shown(name)}: trained_betas: must be 1 to {_LONGEST} numbers between 0 and 1")


def _number(config: Mapping[str, Any], key: str, default: float, *, most: float = 1e3) -> float:
    """A positive number of a configuration."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
        raise AntherError(
            f"scheduler {config.get('_class_name')}: {key}={shown(value)}: must be over 0 and at most {most:g}"
        )
    return value


def _dynamic_shift(config: Mapping[str, Any], tokens: int) -> float:
    """From base_shift to max_shift, linear in the number of tokens, as the pipelines have it (`calculate_shift`)."""
    few, many = (_number(config, f"{end}_image_seq_len", n, most=1e6) for end, n in (("base", 256), ("max", 4096)))
    least, most = (_number(config, f"{end}_shift", n, most=10.0) for end, n in (("base", 0.5), ("max", 1.15)))
    if few == many:
        raise AntherError(f"scheduler {config.get('_class_name')}: base_image_seq_len=max_image_seq_len={few}")
    mu: float = least + (most - least) * (tokens - few) / (many - few)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)
