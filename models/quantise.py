"""int8 weights for the frozen base: symmetric, one scale per output channel.

The floating-point weight exists only inside one layer's forward or backward: autograd keeps the int8 tensor
and multiplies it out again, where weight-only schemes that dequantise in the graph keep both.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

_SMALLEST = 1024  # weights with fewer elements stay as they are: nothing to save


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values of `weight` [out, …] and float32 scales [out, 1, …]; |error| ≤ scale/2 everywhere."""
    flat = weight.detach().float().flatten(1)
    scale = flat.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
    values = (flat / scale).round().clamp(-127, 127).to(torch.int8)
    return values.view_as(weight), scale.view(-1, *[1] * (weight.dim() - 1))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, values, scale, bias):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(values, scale)
        return F.linear(x, values.to(x.dtype) * scale.to(x.dtype), bias)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        values, scale = ctx.saved_tensors
        return grad @ (values.to(grad.dtype) * scale.to(grad.dtype)), None, None, None


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, values, scale, bias, stride, padding, dilation, groups):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(values, scale)
        ctx.shape, ctx.geometry = x.shape, (stride, padding, dilation, groups)
        return F.conv2d(x, values.to(x.dtype) * scale.to(x.dtype), bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        values, scale = ctx.saved_tensors
        weight = values.to(grad.dtype) * scale.to(grad.dtype)
        return conv2d_input(ctx.shape, weight, grad, *ctx.geometry), *[None] * 7


class _Int8Layer(nn.Module):
    values: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        values, scale = quantise(layer.weight)
        self.register_buffer("values", values)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())


class Int8Linear(_Int8Layer):
    """A frozen nn.Linear with int8 weights."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        return _Linear.apply(x, self.values, self.scale, self.bias)


class Int8Conv2d(_Int8Layer):
    """A frozen nn.Conv2d (zero padding) with int8 weights."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__(layer)
        self.kernel_size, self.groups = layer.kernel_size, layer.groups
        self.stride, self.padding, self.dilation = layer.stride, layer.padding, layer.dilation

    def forward(self, x: Tensor) -> Tensor:
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        return _Conv2d.apply(x, self.values, self.scale, self.bias, *geometry)


def quantise_layers(module: nn.Module) -> None:
    """Replace every Linear and Conv2d below `module` by its int8 form, in place."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear) and child.weight.numel() >= _SMALLEST:
            setattr(module, name, Int8Linear(child))
        elif isinstance(child, nn.Conv2d) and child.weight.numel() >= _SMALLEST:
            setattr(module, name, Int8Conv2d(child))
        else:
            quantise_layers(child)
