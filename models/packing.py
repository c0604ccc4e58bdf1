"""What a base with packed weights takes: layers that hold as many bytes as packed ones, without their numbers.

For dry runs of bases that nobody has: the real packed layers need real weights to be made of.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from conf.errors import AntherError

SMALLEST = 1024  # weights with fewer elements stay as they are


class Packing(NamedTuple):
    """How the weights of one kind of layer are held."""

    bits: float  # of one weight
    block: int | None  # weights that share a float32 scale; None: those of one output
    scratch: float  # bytes for each weight that dequantising takes beside the float32 weight it makes

    def bytes(self, weight: Tensor) -> int:
        """Of a packed weight [out, …], with its scales."""
        scales = len(weight) if self.block is None else math.ceil(weight.numel() / self.block)
        return math.ceil(weight.numel() * self.bits / 8) + 4 * scales


INT8 = Packing(8, None, 4.0)  # cast, then scaled: the cast one lives until then
NF4 = Packing(4, 64, 2.0)  # an int32 index for each byte, which holds two

MODES: dict[str, dict[type[nn.Module], Packing]] = {
    "fp32": {},
    "int8": {nn.Linear: INT8, nn.Conv2d: INT8},
    "mixed": {nn.Linear: NF4, nn.Conv2d: INT8},
    "nf4": {nn.Linear: NF4, nn.Conv2d: NF4},
}


def pack_shapes(network: nn.Module, mode: str) -> None:
    """Replace every linear layer and convolution of a network on the meta device by its packed shape, in place."""
    if mode not in MODES:
        raise AntherError(f"base.weights={mode}: must be one of: {', '.join(MODES)}")
    for name, child in list(network.named_children()):
        packing = MODES[mode].get(type(child))
        if packing and isinstance(child, nn.Linear) and child.weight.numel() >= SMALLEST:
            setattr(network, name, PackedLinear(child, packing))
        elif packing and isinstance(child, nn.Conv2d) and child.weight.numel() >= SMALLEST:
            setattr(network, name, PackedConv2d(child, packing))
        else:
            pack_shapes(child, mode)


class _PackedShape(nn.Module):
    packed: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear | nn.Conv2d, packing: Packing) -> None:
        super().__init__()
        self.shape, self.scratch = layer.weight.shape, packing.scratch
        self.register_buffer("packed", torch.empty(packing.bytes(layer.weight), dtype=torch.uint8, device="meta"))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def dequantised(self, packed: Tensor) -> Tensor:
        """A weight without contents, by way of what making it takes."""
        scratch = packed.new_empty(int(self.shape.numel() * self.scratch))
        weight = packed.new_empty(self.shape, dtype=torch.float32)
        del scratch
        return weight


class PackedLinear(_PackedShape):
    """The shape of a frozen nn.Linear with packed weights."""

    def __init__(self, layer: nn.Linear, packing: Packing) -> None:
        super().__init__(layer, packing)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        return _Linear.apply(x, self.packed, self)


class PackedConv2d(_PackedShape):
    """The shape of a frozen nn.Conv2d with packed weights."""

    def __init__(self, layer: nn.Conv2d, packing: Packing) -> None:
        super().__init__(layer, packing)
        self.kernel_size = layer.kernel_size
        self.stride, self.padding, self.dilation = layer.stride, layer.padding, layer.dilation
        self.groups = layer.groups
        self.geometry: Any = (layer.stride, layer.padding, layer.dilation, layer.groups)

    def forward(self, x: Tensor) -> Tensor:
        return _Conv2d.apply(x, self.packed, self)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, packed: Tensor, layer: PackedLinear) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.layer = layer
        ctx.save_for_backward(packed)
        return F.linear(x, layer.dequantised(packed), layer.bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ ctx.layer.dequantised(*ctx.saved_tensors), None, None


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, packed: Tensor, layer: PackedConv2d) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.layer, ctx.shape = layer, x.shape
        ctx.save_for_backward(packed)
        return F.conv2d(x, layer.dequantised(packed), layer.bias, *layer.geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        layer = ctx.layer
        weight = layer.dequantised(*ctx.saved_tensors)
        return conv2d_input(ctx.shape, weight, grad, *layer.geometry), None, None
