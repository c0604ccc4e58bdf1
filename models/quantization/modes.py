"""Weight modes: the quantization type of each layer, and the layers that stay in full precision."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from models.quantization.blockwise import QuantizedTensor, empty_quantized, quantize
from models.quantization.layers import QuantizedConv2d, QuantizedLinear

WEIGHT_MODES = {
    "fp32": (None, None),
    "int8": ("int8", "int8"),
    "mixed": ("nf4", "int8"),
    "nf4": ("nf4", "nf4"),
}
"""Types of linear and of convolution layers. Most of nf4's loss of quality is due to 4-bit convolutions."""

_SMALLEST = 1024  # layers with fewer weights stay in full precision: nothing to save
_ENDS = re.compile(r"conv_in|conv_out|proj_out|pos_embed\..*")  # full precision too: all data passes through them
_TIMES = re.compile(r"(.*\.)?(time|add|timestep|guidance)\w*emb\w*(\..*)?")  # int8: they condition every block


def quant_types(network: nn.Module, mode: str) -> dict[str, str]:
    """Return 'nf4' or 'int8' for each layer that `mode` quantizes, in the network's order."""
    types = ((name, _quant_type(name, layer, mode)) for name, layer in network.named_modules())
    return {name: quant_type for name, quant_type in types if quant_type}


def quantize_layers(network: nn.Module, mode: str) -> None:
    """Quantize the layers of a mode in place."""
    for name, quant_type in quant_types(network, mode).items():
        replace_layer(network, name, quantize(network.get_submodule(name).weight, quant_type))  # type: ignore[arg-type]


def quantize_meta(network: nn.Module, types: Mapping[str, str]) -> None:
    """Replace layers of a network on the meta device by quantized ones of these types: equal in size, without data."""
    for name, quant_type in types.items():
        replace_layer(network, name, empty_quantized(quant_type, network.get_parameter(f"{name}.weight").numel()))


def replace_layer(network: nn.Module, name: str, packed: QuantizedTensor) -> None:
    """Replace one layer by a quantized layer with this weight.

    Args:
        network: changed in place.
        name: name of a linear or convolution layer.
        packed: codes and scales.
    """
    parent, _, leaf = name.rpartition(".")
    layer = network.get_submodule(name)
    quantized = QuantizedLinear(layer, packed) if isinstance(layer, nn.Linear) else QuantizedConv2d(layer, packed)  # type: ignore[arg-type]
    network.get_submodule(parent).register_module(leaf, quantized)


def _quant_type(name: str, layer: nn.Module, mode: str) -> str | None:
    if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or layer.padding_mode != "zeros"):
        return None
    if not isinstance(layer, nn.Linear | nn.Conv2d) or layer.weight.numel() < _SMALLEST or _ENDS.fullmatch(name):
        return None
    linear, convolution = WEIGHT_MODES[mode]
    quant_type = linear if isinstance(layer, nn.Linear) else convolution
    return "int8" if quant_type and _TIMES.fullmatch(name) else quant_type
