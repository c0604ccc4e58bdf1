"""Validate a pipeline's configurations before anything is built from them.

A base may come from anywhere: converted, edited by hand, or sent by a malicious server. A configuration that would
make a run fail later, or take forever, is refused here with a one-line error.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import AntherError, shown
from models.families.family import Family
from models.quantization.packed import class_of

_LARGEST = 2**14  # largest number in a network's configuration: no published one comes near
_LAYERS = 2**9  # most layers
_SIDE = 2**13  # latents
_CHANNELS = 2**12
_TYPES: dict[type, tuple[type, ...]] = {  # some keys have one value per level
    float: (int, float),
    int: (int, float, list, tuple),
    str: (str, list, tuple),
    bool: (bool, list, tuple),
    tuple: (list, tuple),
}
_LATENTS_OF = {"AutoencoderKL": 4, "AutoencoderDC": 32, "AutoencoderTiny": 4}  # where a VAE's file doesn't say


def check(folder: Path, family: Family, network: Mapping[str, Any], vae: Mapping[str, Any], vae_class: str) -> None:
    """Refuse configurations that don't fit each other or this family.

    Args:
        folder: the pipeline's folder.

    Raises:
        AntherError: a configuration doesn't fit; the message names the part, the key and the fix.
    """
    part = f"base {folder}: its {family.network}"
    if "quantization_config" in network:
        raise AntherError(f"{part} is quantized already: give the base in full precision, and choose base.weights")
    _typed(part, network, family.kind)
    _bounded(part, network)
    _bounded(f"base {folder}: its vae", vae)
    heads, width = network.get("num_attention_heads"), network.get("attention_head_dim")
    if isinstance(heads, int) and isinstance(width, int) and heads * width > _LARGEST:
        raise AntherError(f"{part} has {heads} heads of {width} channels: no network is like that")
    channels = _whole(part, network, "in_channels", 1, _CHANNELS)
    if network.get("patch_size") is not None:
        _whole(part, network, "patch_size", 1, _SIDE)
    if network.get("time_cond_proj_dim") is not None:
        _whole(part, network, "time_cond_proj_dim", 4, _CHANNELS)
    latents = family.latents(network)
    if (stated := network.get("sample_size")) is not None and not 1 <= (latents.side or 0) <= _SIDE:
        raise AntherError(f"{part} has sample_size={shown(stated)}: must be one whole number, 1 to {_SIDE} latents")
    _check_vae(f"base {folder}: its vae", vae)
    latent = latents.channels
    _check_statistics(f"base {folder}: its vae", vae, latent, family)
    given = vae.get("latent_channels", _LATENTS_OF[vae_class])
    if latent != given:
        kind = " (one for inpainting?)" if latent > given else ""
        raise AntherError(
            f"{part} takes latents of {latent} channels{kind} and its vae makes {shown(given)}: only text to image"
        )
    made = network.get("out_channels")
    if made is not None and made not in (channels, 2 * channels):  # twice: it predicts its variance too
        raise AntherError(f"{part} takes {channels} channels and makes {shown(made)}: only text to image is supported")


def _typed(part: str, config: Mapping[str, Any], kind: str) -> None:
    """Refuse values whose type differs from the diffusers class's default: many are first used in a forward pass."""
    for key, parameter in inspect.signature(class_of(kind)).parameters.items():
        default, value = parameter.default, config.get(key, parameter.default)
        if value is default or (value is None and not isinstance(default, float)):
            continue
        wanted = _TYPES.get(type(default))
        if wanted and (not isinstance(value, wanted) or (isinstance(value, bool) and not isinstance(default, bool))):
            raise AntherError(f"{part} has {key}={shown(value)}, where {kind} has {default} by default")


def _bounded(part: str, config: Mapping[str, Any]) -> None:
    """Refuse implausible numbers: the libraries allocate the configured network before they read its files."""
    for key, value in config.items():
        for number in value if isinstance(value, list | tuple) else (value,):
            if isinstance(number, list):
                _bounded(part, {key: number})
            elif isinstance(number, int | float) and not abs(number) <= (_LAYERS if "layers" in key else _LARGEST):
                raise AntherError(f"{part} has {key}={shown(value)}: no network is like that")


def _check_vae(part: str, vae: Mapping[str, Any]) -> None:
    blocks = vae.get("encoder_block_out_channels") or vae.get("block_out_channels")
    if not isinstance(blocks, list) or not 1 <= len(blocks) <= 10:
        raise AntherError(f"{part} has block_out_channels={shown(blocks)}: must be the channels of 1 to 10 levels")
    for key in ("in_channels", "latent_channels"):
        if key in vae:
            _whole(part, vae, key, 1, _CHANNELS)
    for key in ("scaling_factor", "shift_factor"):
        value = vae.get(key, 1.0)
        shift = key == "shift_factor" and value is None
        if not shift and (isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST):
            raise AntherError(
                f"{part} has {key}={shown(value)}: must be a number (SD 1 and 2 have 0.18215, SDXL 0.13025)"
            )
    if vae.get("scaling_factor") == 0:
        raise AntherError(f"{part} has scaling_factor=0: nothing of a picture would be left")


def _check_statistics(part: str, vae: Mapping[str, Any], channels: int, family: Family) -> None:
    """Require a mean and a standard deviation for every latent channel, or neither."""
    stated = [key for key in ("latents_mean", "latents_std") if vae.get(key) is not None]
    if stated and not family.latent_statistics:
        raise AntherError(f"{part} has {stated[0]}, which {family.pipeline} of diffusers ignores: remove it")
    for key in ("latents_mean", "latents_std") if stated else ():
        found = vae.get(key)
        sound = isinstance(found, list) and len(found) == channels
        if not sound or not all(isinstance(value, int | float) and abs(value) <= _LARGEST for value in found or ()):
            raise AntherError(
                f"{part} has {key}={shown(found)}: must be {channels} numbers, with both a mean and a deviation"
            )
    if stated and not all(value > 0 for value in vae["latents_std"]):
        raise AntherError(f"{part} has latents_std={shown(vae['latents_std'])}: must be over 0")


def _whole(part: str, config: Mapping[str, Any], key: str, least: int, most: int) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise AntherError(f"{part} has {key}={shown(value)}: must be a whole number, {least} to {most}")
    return value
