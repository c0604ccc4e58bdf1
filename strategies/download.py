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
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from common.seeding import derive_seed
from models.lora.adapter import Adapter, Sites, adapter_shapes, from_tensors, rank, to_tensors
from models.lora.lora_xs import to_tensors_with_bases
from models.lora.scaffold import to_control_tensors
from protocol import quantization, tensor_codec
from protocol.messages import QuantizedFormat

FP32 = "fp32"


@dataclass(frozen=True, kw_only=True)
class AdapterFormat:
    """Sites of the adapter in a base, and the payloads that devices receive."""

    sites: Sites
    """Sites in the base."""
    adapted: tuple[str, ...] | None = None
    """Names of the sites, if they differ from those that the base's family adapts; None: they don't."""
    lora_xs_bases: Adapter | None = None
    """Fixed factors, for an aggregation of the cores between them."""
    precision: str = FP32
    """Precision of downloads."""

    def decode(self, data: bytes) -> Adapter:
        """Decode a payload in full precision; CodecError if it is not an adapter of these sites."""
        return from_tensors(tensor_codec.decode(data, adapter_shapes(self.sites, -1)))

    def as_decoded(self, adapter: Adapter) -> Adapter:
        """Return an adapter as it is decoded from its payload: without subnormal numbers."""
        return self.decode(tensor_codec.encode(to_tensors(adapter)))

    def encode(self, adapter: Adapter) -> Download:
        """Encode an adapter for evaluation or personalization."""
        return encode_download(adapter, self.precision)

    def encode_for_training(self, adapter: Adapter, control: Mapping[str, Tensor]) -> Download:
        """Encode an adapter with the further tensors that training needs.

        Args:
            adapter: the shared adapter.
            control: SCAFFOLD's control variate; empty without it.

        Returns:
            The payload. With further tensors, all are sent in full precision.
        """
        if not (self.lora_xs_bases or control):
            return self.encode(adapter)
        bases = self.lora_xs_bases
        tensors = to_tensors_with_bases(adapter, bases) if bases else to_tensors(adapter)
        return Download(tensor_codec.encode(tensors | to_control_tensors(control)), adapter, None)


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
