"""What kernels take for themselves while they run: memory that no tensor shows.

A model of PyTorch's CPU kernels, fitted on single operations (2 cores of x86-64 with AVX2, torch 2.13, oneDNN; each
operation by itself, peak resident memory less its tensors). oneDNN lays a convolution's operands out in blocks:

    convolution k×k            its input and its weight once more
    its gradient by the input  the gradient that comes in and the weight; with a stride, what it returns as well
    1×1 convolution            its input, mostly
    its gradient by the input  what it returns
    either, without an input   that input, of which only the shape is needed (`torch.nn.grad.conv2d_input`)
    attention, backward        the queries once more

Matrix products, norms and element-wise operations took nothing that could be seen.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def workspace(func: Any, args: Any, result: Any) -> int:
    """Bytes that one operation takes beside its arguments and results.

    Args:
        func: the overload that a dispatch mode was given, with its positional `args` and its `result`.
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
