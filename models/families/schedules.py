"""The forward process that a checkpoint was trained with, from its scheduler's own configuration.

Flows are trained on every σ of the scheduler's table alike often, as shifted there. Their makers draw the middle more
often besides (Esser et al., 2024, arXiv:2403.03206, §3.1); here the shift alone decides. Where pictures are drawn
through σ that are shifted by their size, the table isn't shifted, as it isn't in that scheduler itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from conf.errors import AntherError
from models.objective import Schedule, diffusion, rectified_flow

_BETAS = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
)  # fmt: skip


def schedule_of(config: Mapping[str, Any], tokens: int) -> Schedule:
    """The schedule that a `scheduler_config.json` describes, for latents of so many tokens.

    Raises:
        AntherError: it is neither a discrete diffusion nor a rectified flow.
    """
    length = config.get("num_train_timesteps", 1000)
    if config.get("_class_name") == "FlowMatchEulerDiscreteScheduler":
        if config.get("use_dynamic_shifting"):
            return rectified_flow(length, trained_shift=1.0, shift=_dynamic_shift(config, tokens))
        shift = config.get("shift", 1.0)
        return rectified_flow(length, trained_shift=shift, shift=shift)
    prediction = config.get("prediction_type", "epsilon")
    if config.get("use_flow_sigmas") or prediction == "flow_prediction":
        shift = config.get("flow_shift") or 1.0
        return rectified_flow(length, trained_shift=shift, shift=shift)
    if "beta_start" not in config:
        raise AntherError(f"scheduler {config.get('_class_name')}: neither a diffusion with betas nor a rectified flow")
    from diffusers import DDIMScheduler  # slow import, so only here

    scheduler: Any = DDIMScheduler(**{key: config[key] for key in _BETAS if key in config})
    return diffusion(scheduler.alphas_cumprod, prediction)


def _dynamic_shift(config: Mapping[str, Any], tokens: int) -> float:
    """From base_shift to max_shift, linear in the number of tokens, as the pipelines have it (`calculate_shift`)."""
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu: float = least + (most - least) * (tokens - few) / (many - few)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)
