"""Parse the forward process that a checkpoint was trained with from its scheduler's configuration.

Flows are trained on the σ of the scheduler's shifted table. SD3 also draws the middle more often, with a logit-normal
density (Esser et al., 2024, arXiv:2403.03206, §3.1), as its authors and diffusers' scripts do: 1.4 % of its steps have
σ below 0.25 and 3.2 % above 0.95, where uniform steps would have 10 and 14 %. Flux and Sana draw uniformly, as
diffusers' scripts do. If σ are shifted by image size during sampling, the training table isn't shifted, as in that
scheduler itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from common.errors import AntherError, shorten
from models.diffusion.objective import Schedule, diffusion, rectified_flow
from models.files.diffusers_classes import diffusers_class

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
_LONGEST = 10_000  # steps: the largest published schedule has 1,000
_MIN_SIGNAL = 1e-6  # a_T below which a prediction of ε contains no information about the image


def parse_schedule(config: Mapping[str, Any], tokens: int, *, logit_normal: bool = False) -> Schedule:
    """Return the schedule that a `scheduler_config.json` describes.

    Args:
        config: content of the file.
        tokens: number of latent tokens of an image.
        logit_normal: for a flow, train the middle more often.

    Raises:
        AntherError: it is neither a discrete diffusion nor a rectified flow, or has invalid values.
    """
    name = config.get("_class_name")
    length = config.get("num_train_timesteps", 1000)
    if isinstance(length, bool) or not isinstance(length, int) or not 1 <= length <= _LONGEST:
        raise AntherError(
            f"scheduler {shorten(name)}: num_train_timesteps={shorten(repr(length))}: must be a whole number, "
            f"1 to {_LONGEST}"
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
        raise AntherError(f"scheduler {shorten(name)}: neither a diffusion with betas nor a rectified flow")
    if config.get("trained_betas") is None:
        for key in ("beta_start", "beta_end"):
            _number(config, key, 0.01, maximum=1.0)
        if (kind := config.get("beta_schedule", "linear")) not in _BETA_SCHEDULES:
            raise AntherError(
                f"scheduler {shorten(name)}: beta_schedule={shorten(kind)}: only {', '.join(_BETA_SCHEDULES)} are "
                "supported"
            )
    else:
        _check_betas(name, config["trained_betas"])
    scheduler: Any = diffusers_class("DDIMScheduler")(**{key: config[key] for key in _BETAS if key in config})
    signal = float(scheduler.alphas_cumprod.min()) ** 0.5
    if prediction == "epsilon" and not signal >= _MIN_SIGNAL:
        raise AntherError(
            f"scheduler {shorten(name)}: prediction_type=epsilon with zero terminal signal (rescale_betas_zero_snr): "
            "such bases predict v; set prediction_type=v_prediction if this one does"
        )
    return diffusion(scheduler.alphas_cumprod, prediction)


def _check_betas(name: Any, betas: Any) -> None:
    valid = isinstance(betas, list) and 1 <= len(betas) <= _LONGEST
    if not valid or not all(isinstance(beta, float) and 0 < beta < 1 for beta in betas):
        raise AntherError(f"scheduler {shorten(name)}: trained_betas: must be 1 to {_LONGEST} numbers between 0 and 1")


def _number(config: Mapping[str, Any], key: str, default: float, *, maximum: float = 1e3) -> float:
    """Return a positive number of a configuration."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= maximum:
        raise AntherError(
            f"scheduler {config.get('_class_name')}: {key}={shorten(value)}: must be over 0 and at most {maximum:g}"
        )
    return value


def _dynamic_shift(config: Mapping[str, Any], tokens: int) -> float:
    """Interpolate from base_shift to max_shift by the number of tokens, as `calculate_shift` in the pipelines."""
    few, many = (_number(config, f"{end}_image_seq_len", n, maximum=1e6) for end, n in (("base", 256), ("max", 4096)))
    low, high = (_number(config, f"{end}_shift", n, maximum=10.0) for end, n in (("base", 0.5), ("max", 1.15)))
    if few == many:
        raise AntherError(f"scheduler {config.get('_class_name')}: base_image_seq_len=max_image_seq_len={few}")
    mu: float = low + (high - low) * (tokens - few) / (many - few)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)
