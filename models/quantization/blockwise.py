"""Block-wise NF4 and int8: how a frozen weight is held in few bits, and read again slab by slab.

Weights in a row make a block, which shares one scale; its entries are codes for values in [−1, 1]. Those of NF4 are
quantiles of the normal distribution (Dettmers et al., 2023, arXiv:2305.14314, appendix E), those of int8 lie evenly.
Scales are quantised too, as there (§3): 8 bits each, in steps of 2^(1/16) below the layer's largest. Of these steps a
block takes the one that leaves the least squared error, which is seldom that of its largest entry.
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

from models.base.paging import release_pages

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
_OCTAVE = 16  # steps of a scale until it is half as large
_TRIED = {"nf4": range(-1, 5), "int8": range(2)}  # steps below that of the block's largest entry
_CHUNK = 1 << 18  # weights that are quantised at once
_SLAB = {"cpu": 1 << 22, "cuda": 1 << 26}  # weights that are read at once: 16 MiB in float32, or any layer whole
_PAIR = {2: torch.int32, 4: torch.int64, 8: torch.complex128}  # as wide as two numbers of so many bytes


class QuantizedTensor(NamedTuple):
    """A weight in few bits: its rows one after the other, the last block filled up. It doesn't know its shape."""

    codes: Tensor  # nf4: uint8 [blocks · 16], two codes each, the first in the high bits; int8: int8 [blocks · 64]
    scales: Tensor  # uint8 [blocks]: steps below the largest
    top: Tensor  # int32 [1]: the bits of the largest scale, a float32: a change of the network's precision passes by

    @property
    def kind(self) -> str:
        """'nf4' or 'int8'."""
        return "nf4" if self.codes.dtype == torch.uint8 else "int8"


def empty_quantized(kind: str, count: int) -> QuantizedTensor:
    """Tensors without data that `count` weights would be held in."""
    blocks, codes = -(-count // BLOCK_SIZES[kind]), {"nf4": torch.uint8, "int8": torch.int8}[kind]
    width = BLOCK_SIZES[kind] // 2 if kind == "nf4" else BLOCK_SIZES[kind]
    with torch.device("meta"):
        return QuantizedTensor(
            torch.empty(blocks * width, dtype=codes),
            torch.empty(blocks, dtype=torch.uint8),
            torch.empty(1, dtype=torch.int32),
        )


@torch.no_grad()
def quantize(weight: Tensor, kind: str) -> QuantizedTensor:
    """A weight of any shape and precision in codes of least squared error; `kind` is 'nf4' or 'int8'."""
    size, flat = BLOCK_SIZES[kind], weight.detach().flatten()
    blocks = F.pad(flat, (0, -len(flat) % size)).view(-1, size)
    top = blocks.abs().amax().float().clamp_min(torch.finfo(torch.float32).tiny).view(1)
    parts = [_closest(part.float(), _scales(top), kind) for part in blocks.split(_CHUNK // size)]
    codes, scales = (torch.cat(part) for part in zip(*parts, strict=True))
    return QuantizedTensor(codes.flatten(), scales, top.view(torch.int32))


def dequantize(packed: QuantizedTensor, shape: torch.Size, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight of that shape which the codes stand for, whole."""
    weight = torch.empty(shape, dtype=dtype, device=packed.codes.device)
    for rows, slab in iter_slabs(packed, shape, dtype):
        weight[rows] = slab
    return weight


def iter_slabs(packed: QuantizedTensor, shape: torch.Size, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The weight of shape [out, …] in slabs of whole rows [rows, …], each of which overwrites the one before.

    So a layer is never there as a whole in `dtype`: the largest of Stable Diffusion 1.5 would take 118 MB.
    """
    out, row, size = shape[0], shape[1:].numel(), BLOCK_SIZES[packed.kind]
    even = size // gcd(row, size)  # so many rows fill blocks
    step = min(out, max(even, _SLAB[packed.codes.device.type] // row // even * even))
    scales = _scales(packed.top.view(torch.float32)).to(dtype)
    buffer = _buffer(-(-step * row // size) * size, dtype, packed.codes).view(-1, size)
    for start in range(0, out, step):
        rows = slice(start, min(start + step, out))
        blocks = slice(start * row // size, -(-rows.stop * row // size))
        values = _values(packed, blocks, buffer[: blocks.stop - blocks.start])
        values *= scales.index_select(0, packed.scales[blocks].int())[:, None]
        yield rows, values.view(-1)[: (rows.stop - start) * row].view(-1, *shape[1:])


class _Scratch(threading.local):
    """What a thread reads slabs into: new memory for every layer costs its page faults, a twentieth of a step."""

    bytes = torch.empty(0, dtype=torch.uint8)


_scratch = _Scratch()


@contextmanager
def fresh_scratch() -> Iterator[None]:
    """Within this context the caller's thread reads slabs into memory that is gone afterwards.

    So a dry run holds what a real one does: under a FakeTensorMode what is kept is fake as well.
    """
    before, _scratch.bytes = _scratch.bytes, torch.empty(0, dtype=torch.uint8)
    try:
        yield
    finally:
        _scratch.bytes = before


def _buffer(count: int, dtype: torch.dtype, codes: Tensor) -> Tensor:
    """Memory for `count` weights, beside their codes."""
    kept = codes.device.type == "cpu" and not torch.compiler.is_compiling()  # asked first, or dynamo guards the scratch
    if not kept or type(codes) is not type(_scratch.bytes):  # of another type: shapes alone are traced
        return codes.new_empty(count, dtype=dtype)
    if len(_scratch.bytes) < count * dtype.itemsize:
        with torch.inference_mode(False):
            _scratch.bytes = codes.new_empty(count * dtype.itemsize, dtype=torch.uint8)
    return _scratch.bytes[: count * dtype.itemsize].view(dtype)


def _real(codes: Tensor) -> bool:
    """Whether there are data: not when shapes alone are traced."""
    return type(codes) is Tensor and not torch.compiler.is_compiling()


def _values(packed: QuantizedTensor, blocks: slice, out: Tensor) -> Tensor:
    """What the codes of these blocks stand for, in units of their scales, in `out`."""
    width = len(packed.codes) // len(packed.scales)
    start, stop = blocks.start * width, blocks.stop * width
    codes = packed.codes[start:stop]
    if packed.kind == "int8":
        out.copy_(codes.view_as(out)).div_(_INT8)
    else:
        pairs, wide = (_pairs if _real(codes) else _pairs.__wrapped__)(out.dtype, out.device), _PAIR[out.element_size()]
        torch.index_select(pairs.view(wide).view(-1), 0, codes.int(), out=out.view(wide).view(-1))
    release_pages(packed.codes, start, stop)
    return out


@cache
def _pairs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The two values [256, 2] that a byte of NF4 codes stands for: one look-up yields both."""
    table = torch.tensor(_NF4, dtype=torch.float64)
    byte = torch.arange(256)
    return torch.stack([table[byte >> 4], table[byte & 15]], dim=1).to(device, dtype)


def _scales(top: Tensor) -> Tensor:
    """The 256 scales that a block may have, the largest first: float32."""
    return top * torch.exp2(torch.arange(256, device=top.device) / -_OCTAVE)


def _closest(blocks: Tensor, scales: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Codes and scales of blocks [n, size]."""
    largest = blocks.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny)
    first = (torch.log2(scales[0] / largest) * _OCTAVE).floor()
    least = torch.full_like(largest, torch.inf)
    codes = torch.zeros_like(blocks, dtype=torch.uint8 if kind == "nf4" else torch.int8)
    chosen = torch.zeros_like(largest, dtype=torch.uint8)
    for step in _TRIED[kind]:
        tried = (first + step).clamp_(0, 255).to(torch.uint8)
        scale = scales.index_select(0, tried.int())[:, None]
        found, values = _nearest(blocks / scale, kind)
        error = values.mul_(scale).sub_(blocks).square_().sum(1)
        better = error < least
        least = torch.where(better, error, least)
        codes = torch.where(better[:, None], found, codes)
        chosen = torch.where(better, tried, chosen)
    return (codes[:, ::2] << 4 | codes[:, 1::2]) if kind == "nf4" else codes, chosen


def _nearest(values: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The codes nearest to these values, and what they stand for."""
    if kind == "int8":
        codes = (values * _INT8).round_().clamp_(-_INT8, _INT8)
        return codes.to(torch.int8), codes / _INT8
    table = torch.tensor(_NF4, device=values.device)
    codes, above = torch.zeros_like(values), torch.empty_like(values)
    for border in ((table[1:] + table[:-1]) / 2).tolist():  # a sixth of the time of torch.bucketize
        codes += torch.gt(values, border, out=above)
    return codes.to(torch.uint8), table.index_select(0, codes.flatten().int()).view_as(values)
