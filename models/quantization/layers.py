"""Frozen layers with quantized weights.

The floating-point weight exists only slab by slab, inside one layer's forward or backward. Autograd saves the codes and
the backward pass dequantizes them again, whereas weight-only schemes that dequantize in the graph keep both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from models.quantization.blockwise import QuantizedTensor, iter_slabs


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, shape, *packed):  # type: ignore[no-untyped-def]
        ctx.shape = shape
        ctx.save_for_backward(*packed)
        flat = x.reshape(-1, shape[1])
        y = x.new_empty(len(flat), shape[0])
        for rows, weight in iter_slabs(QuantizedTensor(*packed), shape, x.dtype):
            torch.mm(flat, weight.T, out=y[:, rows])
        if bias is not None:
            y += bias
        return y.view(*x.shape[:-1], shape[0])

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        flat = grad.reshape(-1, ctx.shape[0])
        grad_x = grad.new_zeros(len(flat), ctx.shape[1])
        for rows, weight in iter_slabs(QuantizedTensor(*ctx.saved_tensors), ctx.shape, grad.dtype):
            grad_x.addmm_(flat[:, rows], weight)
        return grad_x.view(*grad.shape[:-1], ctx.shape[1]), *[None] * 5


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, shape, geometry, *packed):  # type: ignore[no-untyped-def]
        ctx.shape, ctx.geometry, ctx.inputs = shape, geometry, x.shape
        ctx.save_for_backward(*packed)
        y = None
        for rows, weight in iter_slabs(QuantizedTensor(*packed), shape, x.dtype):
            part = F.conv2d(x, weight, None if bias is None else bias[rows], *geometry)
            if len(weight) == shape[0]:
                return part
            if y is None:
                y = part.new_empty(len(x), shape[0], *part.shape[2:])
            y[:, rows] = part
        return y

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        grad_x = None
        for rows, weight in iter_slabs(QuantizedTensor(*ctx.saved_tensors), ctx.shape, grad.dtype):
            part = conv2d_input(ctx.inputs, weight, grad[:, rows], *ctx.geometry)
            grad_x = part if grad_x is None else grad_x.add_(part)
        return grad_x, *[None] * 6


class QuantizedLayer(nn.Module):
    """Layer with a quantized weight.

    Attributes:
        shape: shape of the weight.
        codes, scales, top: see `models.quantization.blockwise.QuantizedTensor`.
        bias: [out], or None.
    """

    codes: Tensor
    scales: Tensor
    top: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear | nn.Conv2d, packed: QuantizedTensor) -> None:
        super().__init__()
        self.shape = layer.weight.shape
        for name, tensor in packed._asdict().items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    @property
    def packed(self) -> QuantizedTensor:
        """Quantized weight."""
        return QuantizedTensor(self.codes, self.scales, self.top)


class QuantizedLinear(QuantizedLayer):
    """A frozen nn.Linear."""

    def __init__(self, layer: nn.Linear, packed: QuantizedTensor) -> None:
        super().__init__(layer, packed)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Return W x + b: x is [..., in], the result [..., out]."""
        return _Linear.apply(x, self.bias, self.shape, *self.packed)


class QuantizedConv2d(QuantizedLayer):
    """A frozen nn.Conv2d with one group and zero padding."""

    def __init__(self, layer: nn.Conv2d, packed: QuantizedTensor) -> None:
        super().__init__(layer, packed)
        self.in_channels, self.out_channels, self.kernel_size = layer.in_channels, layer.out_channels, layer.kernel_size
        self.stride, self.padding, self.dilation, self.groups = layer.stride, layer.padding, layer.dilation, 1

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of x [N, c, h, w]: [N, out, h', w']."""
        geometry: tuple[Any, ...] = (self.stride, self.padding, self.dilation, self.groups)
        return _Conv2d.apply(x, self.bias, self.shape, geometry, *self.packed)
