"""The adapter as it is sent to devices: whole, or in few bits.

In few bits it is rounded at random (`protocol.quantization`), by coins that follow from the adapter itself: to whomever and
whenever it is sent, these are the bytes. What devices read of them is what they train from and count their change from;
the server keeps the adapter as it was. What rounding took it adds to what the round makes of the rest, so that a change
too small for the grid is not lost: with x̂ = Q(x) and devices' mean change Δ the next adapter is x̂ + Δ + (x − x̂).
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
    """What travels, what is read of it, and how it is to be read."""

    data: bytes
    adapter: Adapter
    rounded: QuantizedFormat | None
    """None: it is whole, as `protocol.tensor_codec` has it."""


def download(adapter: Adapter, precision: str) -> Download:
    """The adapter in `fp32`, or in a precision of `protocol.quantization`."""
    tensors = to_tensors(adapter)
    whole = tensor_codec.encode(tensors)
    if precision == FP32:
        return Download(whole, adapter, None)
    coins = torch.Generator().manual_seed(derive_seed(hashlib.sha256(whole).hexdigest(), "download"))
    data = quantization.encode(tensors, precision, coins)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    read = from_tensors(quantization.decode(data, shapes, precision))
    return Download(data, read, QuantizedFormat(precision=precision, rank=rank(adapter)))


def lost(held: Adapter, sent: Adapter) -> dict[str, Tensor]:
    """x − x̂, of what the server holds and what it sent."""
    read = to_tensors(sent)
    return {name: tensor - read[name] for name, tensor in to_tensors(held).items()}


def add_residual(made: Adapter, residual: Mapping[str, Tensor]) -> Adapter:
    """What a round made, with what rounding took of its start: of directions that are gone nothing comes back."""
    tensors = to_tensors(made)
    for name, left in residual.items():
        there = tuple(slice(min(sizes)) for sizes in zip(left.shape, tensors[name].shape, strict=True))
        whole = tensors[name].clone()
        whole[there] += left[there]
        tensors[name] = whole
    return from_tensors(tensors)
