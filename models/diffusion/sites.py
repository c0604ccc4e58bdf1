"""Sites of an adapter: the layers that `adapter.sites` names.

`attention` means the projections of the family's attention layers, the usual LoRA targets. `linear` means every
`nn.Linear` of the denoiser, as `target_modules="all-linear"` of peft: attention, feed-forward layers, modulations,
embeddings of time and text, and linear inputs and outputs. `all` means these and every convolution that an adapter can
express (one group, zero padding). A 1×1 convolution counts as a convolution. Any other value is a regular expression
that must match a layer's full name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from common.errors import AntherError
from models.lora.adapter import Site, Sites
from models.quantization.layers import QuantizedConv2d, QuantizedLinear

ATTENTION = r".*\.attn[12]?\.(to_(q|k|v|out\.0|add_out)|add_[qkv]_proj)"
"""Projections of all attention layers, including those of text tokens in joint attention."""

SITE_NAMES = ("attention", "linear", "all")
"""Names of sets of sites, from the smallest."""


def find_sites(network: nn.Module, sites: str | None, *, attention: str = ATTENTION) -> dict[str, Site]:
    """Return the layers of a network that `sites` means, in the network's order; see `resolve_sites`."""
    return resolve_sites(adaptable(network), sites, attention=attention)


def resolve_sites(
    layers: Sites, sites: str | None, *, attention: str = ATTENTION, key: str = "adapter.sites"
) -> dict[str, Site]:
    """Return the layers that `sites` means, in their order.

    Args:
        layers: layers to select from.
        sites: one of `SITE_NAMES`, or a regular expression on full names; None: attention.
        attention: regular expression on the names of the family's default sites.
        key: key that the message names.

    Raises:
        AntherError: the expression is invalid, or there is no such layer.
    """
    value = sites or "attention"
    try:
        selected = _matching(layers, value, attention)
    except re.error as error:
        raise AntherError(f"{key}={value}: not a regular expression ({error})") from error
    if not selected:
        raise AntherError(
            f"{key}={value}: matches no layer of the base, such as {next(iter(layers), 'a linear layer')}; "
            f"use {', '.join(SITE_NAMES)} or another regular expression"
        )
    return selected


def named_sites(layers: Sites, *, attention: str = ATTENTION) -> dict[str, frozenset[str]]:
    """Return the layers that each of `SITE_NAMES` means; there may be none."""
    return {name: frozenset(_matching(layers, name, attention)) for name in SITE_NAMES}


def exact_pattern(names: Iterable[str]) -> str:
    """Return the regular expression that matches exactly these layers, even if one has a name of `SITE_NAMES`."""
    return f"(?:{'|'.join(map(re.escape, names))})"


def _matching(layers: Sites, value: str, attention: str) -> dict[str, Site]:
    expression = re.compile({"attention": attention, "linear": ".*", "all": ".*"}.get(value, value))
    return {
        name: site
        for name, site in layers.items()
        if expression.fullmatch(name) and not (value == "linear" and site.kernel)
    }


def adaptable(network: nn.Module) -> dict[str, Site]:
    """Return every linear and convolution layer that can be adapted, by name, in the network's order."""
    return {name: site for name, layer in network.named_modules() if (site := _site(layer))}


def _site(layer: nn.Module) -> Site | None:
    """Return the dimensions of a layer, or None if it can't be adapted."""
    if isinstance(layer, nn.Linear | QuantizedLinear):
        return Site(layer.in_features, layer.out_features)
    if isinstance(layer, QuantizedConv2d):
        return Site(layer.shape[1:].numel(), layer.out_channels, layer.kernel_size)
    if isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros":
        return Site(layer.weight[0].numel(), layer.out_channels, layer.kernel_size)
    return None
