"""Block-wise NF4 and int8 quantization of frozen weights, dequantized slab by slab.

Consecutive weights form a block with one scale; codes stand for values in [−1, 1]. The values of NF4 are quantiles of
the normal distribution (Dettmers et al., 2023, arXiv:2305.14314, appendix E), those of int8 are evenly spaced. Scales
are quantized too, as there (§3): 8 bits each, in steps of 2^(1/16) below the layer's largest. A block uses the step
with the minimum squared error, which is seldom that of its largest entry.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from models.files.paging import release_pages

BLOCK_SIZES = {"nf4": 32, "int8": 64}  # weights that share a scale

_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_INT8 = 127  # the code of 1
_OCTAVE = 16  # steps that halve a scale
_CANDIDATES = {"nf4": range(-1, 5), "int8": range(2)}  # steps below that of the block's largest entry
_CHUNK = 1 << 18  # weights that are quantized at once
_SLAB = {"cpu": 1 << 22, "cuda": 1 << 26}  # weights dequantized at once: 16 MiB in float32, or any whole layer
_PAIR = {2: torch.int32, 4: torch.int64, 8: torch.complex128}  # dtype as wide as two numbers of this many bytes


class QuantizedTensor(NamedTuple):
    """Quantized weight, flattened; the last block is padded. The shape is not stored."""

    codes: Tensor  # nf4: uint8 [blocks · 16], two codes each, the first in the high bits; int8: int8 [blocks · 64]
    scales: Tensor  # uint8 [blocks]: steps below the largest
    top: Tensor  # int32 [1]: bits of the largest scale, a float32; as an integer it survives `network.to(dtype)`

    @property
    def quant_type(self) -> str:
        """'nf4' or 'int8'."""
        return "nf4" if self.codes.dtype == torch.uint8 else "int8"


def empty_quantized(quant_type: str, count: int) -> QuantizedTensor:
    """Return meta tensors of the size that `count` weights need when quantized."""
    blocks, codes = -(-count // BLOCK_SIZES[quant_type]), {"nf4": torch.uint8, "int8": torch.int8}[quant_type]
    width = BLOCK_SIZES[quant_type] // 2 if quant_type == "nf4" else BLOCK_SIZES[quant_type]
    with torch.device("meta"):
        return QuantizedTensor(
            torch.empty(blocks * width, dtype=codes),
            torch.empty(blocks, dtype=torch.uint8),
            torch.empty(1, dtype=torch.int32),
        )


@torch.no_grad()
def quantize(weight: Tensor, quant_type: str) -> QuantizedTensor:
    """Quantize a weight of any shape and dtype with minimum squared error; `quant_type` is 'nf4' or 'int8'."""
    size, flat = BLOCK_SIZES[quant_type], weight.detach().flatten()
    blocks = F.pad(flat, (0, -len(flat) % size)).view(-1, size)
    top = blocks.abs().amax().float().clamp_min(torch.finfo(torch.float32).tiny).view(1)
    parts = [_closest(part.float(), _scales(top), quant_type) for part in blocks.split(_CHUNK // size)]
    codes, scales = (torch.cat(part) for part in zip(*parts, strict=True))
    return QuantizedTensor(codes.flatten(), scales, top.view(torch.int32))


def dequantize(packed: QuantizedTensor, shape: torch.Size, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the whole dequantized weight.

    Args:
        packed: codes and scales.
        shape: shape of the weight.
        dtype: dtype of the result.
    """
    weight = torch.empty(shape, dtype=dtype, device=packed.codes.device)
    for rows, slab in iter_slabs(packed, shape, dtype):
        weight[rows] = slab
    return weight


def iter_slabs(packed: QuantizedTensor, shape: torch.Size, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield the dequantized weight in slabs of whole rows; each slab overwrites the previous one.

    A layer is never materialized in `dtype` as a whole: the largest of Stable Diffusion 1.5 would take 118 MB.

    Args:
        packed: codes and scales.
        shape: [out, …].
        dtype: dtype of the slabs.

    Yields:
        Rows as a slice, and their weights [rows, …].
    """
    out, row, size = shape[0], shape[1:].numel(), BLOCK_SIZES[packed.quant_type]
    aligned = size // gcd(row, size)  # rows that fill whole blocks
    step = min(out, max(aligned, _SLAB[packed.codes.device.type] // row // aligned * aligned))
    scales = _scales(packed.top.view(torch.float32)).to(dtype)
    buffer = _buffer(-(-step * row // size) * size, dtype, packed.codes).view(-1, size)
    for start in range(0, out, step):
        rows = slice(start, min(start + step, out))
        blocks = slice(start * row // size, -(-rows.stop * row // size))
        values = _values(packed, blocks, buffer[: blocks.stop - blocks.start])
        values *= scales.index_select(0, packed.scales[blocks].int())[:, None]
        yield rows, values.view(-1)[: (rows.stop - start) * row].view(-1, *shape[1:])


class _Scratch(threading.local):
    """Per-thread memory for slabs: allocating for every layer costs page faults, a twentieth of a step."""

    bytes = torch.empty(0, dtype=torch.uint8)


_scratch = _Scratch()


@contextmanager
def fresh_scratch() -> Iterator[None]:
    """Use new scratch memory in the calling thread within this context, and release it afterwards.

    Under a FakeTensorMode the scratch has to be fake too, so that a dry run allocates the same memory as a real run.
    """
    previous, _scratch.bytes = _scratch.bytes, torch.empty(0, dtype=torch.uint8)
    try:
        yield
    finally:
        _scratch.bytes = previous


def _buffer(count: int, dtype: torch.dtype, codes: Tensor) -> Tensor:
    """Return memory for `count` weights on the device of their codes."""
    # the device is checked first, or dynamo would guard the scratch
    reusable = codes.device.type == "cpu" and not torch.compiler.is_compiling()
    if not reusable or type(codes) is not type(_scratch.bytes):  # another type: only shapes are traced
        return codes.new_empty(count, dtype=dtype)
    if len(_scratch.bytes) < count * dtype.itemsize:
        with torch.inference_mode(False):
            _scratch.bytes = codes.new_empty(count * dtype.itemsize, dtype=torch.uint8)
    return _scratch.bytes[: count * dtype.itemsize].view(dtype)


def _real(codes: Tensor) -> bool:
    """Return whether the tensor has data, which it doesn't when only shapes are traced."""
    return type(codes) is Tensor and not torch.compiler.is_compiling()


def _values(packed: QuantizedTensor, blocks: slice, out: Tensor) -> Tensor:
    """Write the values of these blocks' codes, in units of their scales, to `out` and return it."""
    width = len(packed.codes) // len(packed.scales)
    start, stop = blocks.start * width, blocks.stop * width
    codes = packed.codes[start:stop]
    if packed.quant_type == "int8":
        out.copy_(codes.view_as(out)).div_(_INT8)
    else:
        pairs, wide = (_pairs if _real(codes) else _pairs.__wrapped__)(out.dtype, out.device), _PAIR[out.element_size()]
        torch.index_select(pairs.view(wide).view(-1), 0, codes.int(), out=out.view(wide).view(-1))
    release_pages(packed.codes, start, stop)
    return out


@cache
def _pairs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the two values [256, 2] of each byte of NF4 codes: one lookup yields both."""
    table = torch.tensor(_NF4, dtype=torch.float64)
    byte = torch.arange(256)
    return torch.stack([table[byte >> 4], table[byte & 15]], dim=1).to(device, dtype)


def _scales(top: Tensor) -> Tensor:
    """Return the 256 possible scales of a block, largest first: float32 [256]."""
    return top * torch.exp2(torch.arange(256, device=top.device) / -_OCTAVE)


def _closest(blocks: Tensor, scales: Tensor, quant_type: str) -> tuple[Tensor, Tensor]:
    """Return codes and scale steps of blocks [n, size]."""
    largest = blocks.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny)
    first = (torch.log2(scales[0] / largest) * _OCTAVE).floor()
    best_error = torch.full_like(largest, torch.inf)
    best_codes = torch.zeros_like(blocks, dtype=torch.uint8 if quant_type == "nf4" else torch.int8)
    best_step = torch.zeros_like(largest, dtype=torch.uint8)
    for offset in _CANDIDATES[quant_type]:
        step = (first + offset).clamp_(0, 255).to(torch.uint8)
        scale = scales.index_select(0, step.int())[:, None]
        codes, values = _nearest(blocks / scale, quant_type)
        error = values.mul_(scale).sub_(blocks).square_().sum(1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_codes = torch.where(better[:, None], codes, best_codes)
        best_step = torch.where(better, step, best_step)
    return (best_codes[:, ::2] << 4 | best_codes[:, 1::2]) if quant_type == "nf4" else best_codes, best_step


def _nearest(values: Tensor, quant_type: str) -> tuple[Tensor, Tensor]:
    """Return the nearest codes and their values, both shaped like `values`."""
    if quant_type == "int8":
        codes = (values * _INT8).round_().clamp_(-_INT8, _INT8)
        return codes.to(torch.int8), codes / _INT8
    table = torch.tensor(_NF4, device=values.device)
    codes, above = torch.zeros_like(values), torch.empty_like(values)
    for border in ((table[1:] + table[:-1]) / 2).tolist():  # takes a sixth of the time of torch.bucketize
        codes += torch.gt(values, border, out=above)
    return codes.to(torch.uint8), table.index_select(0, codes.flatten().int()).view_as(values)
