"""Temporary buffers of kernels: memory that isn't visible as tensors.

A model of PyTorch's CPU kernels, fitted on single operations (2 cores of x86-64 with AVX2, torch 2.13, oneDNN; peak
resident memory of each operation in isolation, minus its tensors). oneDNN copies a convolution's operands to blocked
layouts:

    convolution k×k            a copy of its input and of its weight
    its gradient by the input  a copy of the output gradient and of the weight; with a stride, also of the result
    1×1 convolution            usually a copy of its input
    its gradient by the input  a copy of the result
    either, without an input   that input, although only its shape is needed (`torch.nn.grad.conv2d_input`)
    attention, backward        a copy of the queries

Matrix products, norms and element-wise operations had no measurable buffers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def workspace(func: Any, args: Any, result: Any) -> int:
    """Return the bytes of an operation's temporary buffers.

    Args:
        func: overload that a dispatch mode receives.
        args: its positional arguments.
        result: its result.
    """
    match func.overloadpacket:
        case aten.convolution:
            x, weight = args[0], args[1]
            return x.nbytes + (0 if _is_pointwise(weight) else weight.nbytes)
        case aten.convolution_backward:
            grad, x, weight = args[:3]
            stride, to_x = args[4], result[0]
            if to_x is None:
                return 0
            copied = 0 if x.is_contiguous() else x.numel() * x.element_size()
            if _is_pointwise(weight):
                return copied + to_x.nbytes
            return copied + grad.nbytes + weight.nbytes + (to_x.nbytes if max(stride) > 1 else 0)
        case aten._scaled_dot_product_flash_attention_for_cpu_backward:
            return args[1].nbytes
    return 0


def _is_pointwise(weight: Tensor) -> bool:
    return math.prod(weight.shape[2:]) == 1
