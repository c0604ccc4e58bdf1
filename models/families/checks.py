"""Validate a pipeline's configurations before anything is built from them.

A base may come from anywhere: converted, edited by hand, or sent by a malicious server. A configuration that would
make a run fail later, or take forever, is refused here with a one-line error.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import AntherError, shorten
from models.families.family import Family
from models.quantization.packed import class_of

_LARGEST = 2**14  # limit on numbers in a network's configuration, far above any published one
_LAYERS = 2**9  # limit on numbers of layers
_SIDE = 2**13  # latents
_CHANNELS = 2**12
_TYPES: dict[type, tuple[type, ...]] = {  # some keys have one value per level
    float: (int, float),
    int: (int, float, list, tuple),
    str: (str, list, tuple),
    bool: (bool, list, tuple),
    tuple: (list, tuple),
}
_LATENT_CHANNELS = {"AutoencoderKL": 4, "AutoencoderDC": 32, "AutoencoderTiny": 4}  # defaults, where a file has none


def check(folder: Path, family: Family, network: Mapping[str, Any], vae: Mapping[str, Any], vae_class: str) -> None:
    """Refuse configurations that don't fit each other or this family.

    Args:
        folder: the pipeline's folder, for messages.
        family: family of the pipeline.
        network: configuration of the network.
        vae: configuration of the VAE.
        vae_class: class name of the VAE.

    Raises:
        AntherError: a configuration doesn't fit; the message names the part, the key and the fix.
    """
    part = f"base {folder}: its {family.network}"
    if "quantization_config" in network:
        raise AntherError(f"{part} is already quantized: use the base in full precision, and set base.weights")
    _check_types(part, network, family.kind)
    _check_bounds(part, network)
    _check_bounds(f"base {folder}: its vae", vae)
    heads, width = network.get("num_attention_heads"), network.get("attention_head_dim")
    if isinstance(heads, int) and isinstance(width, int) and heads * width > _LARGEST:
        raise AntherError(f"{part} has {heads} heads of {width} channels: not plausible: copy its config.json again")
    channels = _check_integer(part, network, "in_channels", 1, _CHANNELS)
    if network.get("patch_size") is not None:
        _check_integer(part, network, "patch_size", 1, _SIDE)
    if network.get("time_cond_proj_dim") is not None:
        _check_integer(part, network, "time_cond_proj_dim", 4, _CHANNELS)
    latents = family.latents(network)
    if (stated := network.get("sample_size")) is not None and not 1 <= (latents.side or 0) <= _SIDE:
        raise AntherError(f"{part} has sample_size={shorten(stated)}: must be one whole number, 1 to {_SIDE} latents")
    _check_vae(f"base {folder}: its vae", vae)
    latent = latents.channels
    _check_statistics(f"base {folder}: its vae", vae, latent, family)
    vae_channels = vae.get("latent_channels", _LATENT_CHANNELS[vae_class])
    if latent != vae_channels:
        kind = ", maybe for inpainting," if latent > vae_channels else ""
        raise AntherError(
            f"{part} takes latents of {latent} channels{kind} and its vae makes {shorten(vae_channels)}: only text to "
            "image is supported"
        )
    output = network.get("out_channels")
    if output is not None and output not in (channels, 2 * channels):  # twice: it predicts its variance too
        raise AntherError(
            f"{part} takes {channels} channels and makes {shorten(output)}: only text to image is supported"
        )


def _check_types(part: str, config: Mapping[str, Any], kind: str) -> None:
    """Refuse values whose type differs from the diffusers class's default: many are first used in a forward pass."""
    for key, parameter in inspect.signature(class_of(kind)).parameters.items():
        default, value = parameter.default, config.get(key, parameter.default)
        if value is default or (value is None and not isinstance(default, float)):
            continue
        expected = _TYPES.get(type(default))
        if expected and (
            not isinstance(value, expected) or (isinstance(value, bool) and not isinstance(default, bool))
        ):
            raise AntherError(
                f"{part} has {key}={shorten(value)}, but {kind} has {default} by default: correct its type"
            )


def _check_bounds(part: str, config: Mapping[str, Any]) -> None:
    """Refuse implausible numbers: the libraries allocate the configured network before they read its files."""
    for key, value in config.items():
        for number in value if isinstance(value, list | tuple) else (value,):
            if isinstance(number, list):
                _check_bounds(part, {key: number})
            elif isinstance(number, int | float) and not abs(number) <= (_LAYERS if "layers" in key else _LARGEST):
                raise AntherError(f"{part} has {key}={shorten(value)}: not plausible: copy its config.json again")


def _check_vae(part: str, vae: Mapping[str, Any]) -> None:
    blocks = vae.get("encoder_block_out_channels") or vae.get("block_out_channels")
    if not isinstance(blocks, list) or not 1 <= len(blocks) <= 10:
        raise AntherError(f"{part} has block_out_channels={shorten(blocks)}: must be the channels of 1 to 10 levels")
    for key in ("in_channels", "latent_channels"):
        if key in vae:
            _check_integer(part, vae, key, 1, _CHANNELS)
    for key in ("scaling_factor", "shift_factor"):
        value = vae.get(key, 1.0)
        no_shift = key == "shift_factor" and value is None
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not no_shift and not (is_number and abs(value) <= _LARGEST):
            raise AntherError(
                f"{part} has {key}={shorten(value)}: must be a number (SD 1 and 2 have 0.18215, SDXL 0.13025)"
            )
    if vae.get("scaling_factor") == 0:
        raise AntherError(f"{part} has scaling_factor=0: latents would all be zero")


def _check_statistics(part: str, vae: Mapping[str, Any], channels: int, family: Family) -> None:
    """Require a mean and a standard deviation for every latent channel, or neither."""
    stated = [key for key in ("latents_mean", "latents_std") if vae.get(key) is not None]
    if stated and not family.latent_statistics:
        raise AntherError(f"{part} has {stated[0]}, which diffusers' {family.pipeline} ignores: remove it")
    for key in ("latents_mean", "latents_std") if stated else ():
        values = vae.get(key)
        complete = isinstance(values, list) and len(values) == channels
        if not complete or not all(isinstance(v, int | float) and abs(v) <= _LARGEST for v in values or ()):
            raise AntherError(
                f"{part} has {key}={shorten(values)}: must be {channels} numbers, with both a mean and a deviation"
            )
    if stated and not all(value > 0 for value in vae["latents_std"]):
        raise AntherError(f"{part} has latents_std={shorten(vae['latents_std'])}: must be over 0")


def _check_integer(part: str, config: Mapping[str, Any], key: str, minimum: int, maximum: int) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
        raise AntherError(f"{part} has {key}={shorten(value)}: must be a whole number, {minimum} to {maximum}")
    return value
