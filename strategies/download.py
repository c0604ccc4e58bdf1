"""Download encoding: the adapter as sent to devices, in full precision or quantized.

A quantized adapter is rounded stochastically (`protocol.quantization`), with a seed derived from the adapter itself, so
that every device gets the same bytes at any time. Devices train from the decoded values and measure their change from
them, while the server keeps the unquantized adapter. The quantization residual is added to the result of the round, so
that changes smaller than the quantization step are not lost: with x̂ = Q(x) and the devices' mean change Δ, the next
adapter is x̂ + Δ + (x − x̂).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from common.seeding import derive_seed
from models.lora.adapter import Adapter, from_tensors, rank, to_tensors
from protocol import quantization, tensor_codec
from protocol.messages import QuantizedFormat

FP32 = "fp32"


class Download(NamedTuple):
    """Encoded adapter, its decoded value, and its format."""

    data: bytes
    adapter: Adapter
    rounded: QuantizedFormat | None
    """Quantized format; None: full precision, as in `protocol.tensor_codec`."""


def encode_download(adapter: Adapter, precision: str) -> Download:
    """Encode the adapter in `fp32`, or in a precision of `protocol.quantization`."""
    tensors = to_tensors(adapter)
    full = tensor_codec.encode(tensors)
    if precision == FP32:
        return Download(full, adapter, None)
    rng = torch.Generator().manual_seed(derive_seed(hashlib.sha256(full).hexdigest(), "download"))
    data = quantization.encode(tensors, precision, rng)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    decoded = from_tensors(quantization.decode(data, shapes, precision))
    return Download(data, decoded, QuantizedFormat(precision=precision, rank=rank(adapter)))


def quantization_residual(adapter: Adapter, sent: Adapter) -> dict[str, Tensor]:
    """Compute x − x̂ from the server's adapter and the decoded one."""
    decoded = to_tensors(sent)
    return {name: tensor - decoded[name] for name, tensor in to_tensors(adapter).items()}


def add_residual(aggregated: Adapter, residual: Mapping[str, Tensor]) -> Adapter:
    """Add the quantization residual to the result of a round; the part of removed directions is dropped."""
    tensors = to_tensors(aggregated)
    for name, part in residual.items():
        block = tuple(slice(min(sizes)) for sizes in zip(part.shape, tensors[name].shape, strict=True))
        total = tensors[name].clone()
        total[block] += part[block]
        tensors[name] = total
    return from_tensors(tensors)
