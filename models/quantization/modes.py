"""How each layer's frozen weight is held: the modes, and the layers that they spare."""

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
"""What each mode makes of linear and of convolution layers. 4 bits of a convolution cost most of what nf4 costs."""

_SMALLEST = 1024  # layers with fewer weights stay as they are: nothing to save
_ENDS = re.compile(r"conv_in|conv_out|proj_out|pos_embed\..*")  # stay too: all there is passes through them
_TIMES = re.compile(r"(.*\.)?(time|add|timestep|guidance)\w*emb\w*(\..*)?")  # take 8 bits: all blocks listen to them


def quant_types(network: nn.Module, mode: str) -> dict[str, str]:
    """'nf4' or 'int8' for each layer that `mode` quantises, in the network's order."""
    found = ((name, _kind(name, layer, mode)) for name, layer in network.named_modules())
    return {name: kind for name, kind in found if kind}


def quantize_layers(network: nn.Module, mode: str) -> None:
    """Replace the layers that a mode quantises, in place."""
    for name, kind in quant_types(network, mode).items():
        put(network, name, quantize(network.get_submodule(name).weight, kind))  # type: ignore[arg-type]


def quantize_meta(network: nn.Module, held: Mapping[str, str]) -> None:
    """The same of a network on the meta device, for these layers of these kinds: as many bytes, and no data."""
    for name, kind in held.items():
        put(network, name, empty_quantized(kind, network.get_parameter(f"{name}.weight").numel()))


def put(network: nn.Module, name: str, packed: QuantizedTensor) -> None:
    """Replace one layer by one that holds this weight."""
    parent, _, leaf = name.rpartition(".")
    layer = network.get_submodule(name)
    held = QuantizedLinear(layer, packed) if isinstance(layer, nn.Linear) else QuantizedConv2d(layer, packed)  # type: ignore[arg-type]
    network.get_submodule(parent).register_module(leaf, held)


def _kind(name: str, layer: nn.Module, mode: str) -> str | None:
    if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or layer.padding_mode != "zeros"):
        return None
    if not isinstance(layer, nn.Linear | nn.Conv2d) or layer.weight.numel() < _SMALLEST or _ENDS.fullmatch(name):
        return None
    linear, convolution = WEIGHT_MODES[mode]
    kind = linear if isinstance(layer, nn.Linear) else convolution
    return "int8" if kind and _TIMES.fullmatch(name) else kind
