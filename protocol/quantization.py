"""What training changed, in few bits: blocks of 64 numbers with a scale each, rounded at random and without bias.

A number x of a block with the scale s ≥ max |x| lies between two neighbours on the grid of its precision, and becomes
the upper one with the probability that makes its mean x (stochastic rounding; QSGD, Alistarh et al., 2017,
arXiv:1610.02132, §3.1): s/127 apart in int8, s/7 in int4, and as far as halves of its size are in fp16. What rounding
left of it the sender may add to its next change (error feedback; Seide et al., 2014; Karimireddy et al., 2019,
arXiv:1901.09847). A block whose scale is 0 takes the room of its scale alone: a factor that stayed as it was costs a
quarter of a bit for each number, and a sender may keep its smallest blocks for a later change (top-k by blocks).

The receiver knows every name and shape, so nothing of them travels:

    scales    bfloat16, one for each block, tensors by name, each padded with zeros to whole blocks
    codes     of the blocks whose scale is not 0: 64 halves, 64 bytes, or 32 bytes with the first number in the low bits

Whatever bytes come, the numbers that are read from them are finite, at most `MOST` in size, and not subnormal. What is
let in of them is for the receiver to bound: `models.lora.norm_bound` for everybody, and the server's clip, where it promises
privacy per device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from protocol.tensor_codec import CodecError, Shape

BLOCK = 64  # numbers that share a scale
LEAST, MOST = 2.0**-64, 2.0**16
"""Scales lie between, or are 0."""

_LEVELS = {"fp16": 1, "int8": 127, "int4": 7}  # the largest code
_CODE_BYTES = {"fp16": 2 * BLOCK, "int8": BLOCK, "int4": BLOCK // 2}
_SCALE_BYTES = 2
PRECISIONS = tuple(_LEVELS)


def encode(tensors: Mapping[str, Tensor], precision: str, generator: torch.Generator, *, keep: float = 1.0) -> bytes:
    """The tensors rounded to `precision`: the same bytes for equal tensors and an equal generator.

    Args:
        keep: share of all blocks that are sent, those with the largest norms; the others are read as 0.

    What is not finite, or over `MOST`, becomes something that no receiver takes.
    """
    levels = _LEVELS[precision]
    blocks = _blocks({name: tensors[name].shape for name in tensors}, tensors)
    if keep < 1:
        smallest = blocks.square().sum(dim=1).argsort(stable=True)[: len(blocks) - _kept(len(blocks), keep)]
        blocks[smallest] = 0.0
    scales = _scales(blocks)
    sent = scales > 0
    ratios = (blocks[sent] / scales[sent, None].float() * levels).nan_to_num(0.0, 0.0, 0.0)
    return _bytes(scales) + _packed(_rounded(ratios, precision, generator), precision)


def decode(data: bytes, expected: Mapping[str, Shape], precision: str, *, keep: float = 1.0) -> dict[str, Tensor]:
    """The tensors of exactly these names and shapes, in this order.

    Raises CodecError for anything else than what `encode` writes of such tensors. Their length is held against
    `expected` before anything is allocated, and every scale before a code is looked at.
    """
    blocks, code_bytes = _count(expected), _CODE_BYTES[precision]
    least, most = _SCALE_BYTES * blocks, largest(expected, precision, keep=keep)
    if not least <= len(data) <= most or (len(data) - least) % code_bytes:
        raise CodecError(f"payload of {len(data)} bytes, where {least} to {most} in steps of {code_bytes} may be")
    if not blocks:
        return {name: torch.zeros(shape) for name, shape in expected.items()}
    buffer = bytearray(data)
    scales = torch.frombuffer(buffer, dtype=torch.bfloat16, count=blocks).float()
    sent = scales.view(torch.int32) != 0  # −0 is no scale of ours
    if not (scales[sent].ge(LEAST) & scales[sent].le(MOST)).all():
        raise CodecError(f"a scale is not 0, nor {LEAST:g} to {MOST:g}")
    if int(sent.sum()) * code_bytes != len(data) - least:
        raise CodecError(f"{len(data) - least} bytes of codes for {int(sent.sum())} blocks of {code_bytes}")
    values = torch.zeros(blocks, BLOCK)
    if sent.any():
        codes = _unpacked(buffer, least, precision)
        if not (codes.abs() <= _LEVELS[precision]).all():  # nor is a NaN
            raise CodecError(f"a code of {precision} is over {_LEVELS[precision]}")
        values[sent] = codes * (scales[sent, None] / _LEVELS[precision])
    return _tensors(values, expected)


def largest(expected: Mapping[str, Shape], precision: str, *, keep: float = 1.0) -> int:
    """Bytes of the longest payload for these shapes; all are so long, but for blocks of zeros."""
    blocks = _count(expected)
    return _SCALE_BYTES * blocks + _CODE_BYTES[precision] * _kept(blocks, keep)


def bytes_per_number(precision: str, keep: float = 1.0) -> float:
    """What a number takes in whole blocks."""
    return (_SCALE_BYTES + keep * _CODE_BYTES[precision]) / BLOCK


def _count(shapes: Mapping[str, Shape]) -> int:
    return sum(-(-math.prod(shape) // BLOCK) for shape in shapes.values())


def _kept(blocks: int, keep: float) -> int:
    return math.ceil(keep * blocks)


def _blocks(shapes: Mapping[str, Shape], tensors: Mapping[str, Tensor]) -> Tensor:
    """Every tensor, by name, padded to whole blocks [n, 64], float32: ours to write to."""
    rows = [torch.zeros(0, BLOCK)]
    for name in sorted(shapes):
        flat = tensors[name].detach().to("cpu", torch.float32).reshape(-1)
        rows.append(F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK))
    return torch.cat(rows)


def _tensors(blocks: Tensor, expected: Mapping[str, Shape]) -> dict[str, Tensor]:
    """Inverse of `_blocks`, in the expected order."""
    found, start = {}, 0
    for name in sorted(expected):
        size = math.prod(expected[name])
        end = start + -(-size // BLOCK)
        flat = blocks[start:end].view(-1)
        if flat[size:].any():
            raise CodecError(f"{name}: the numbers that fill its last block are not 0")
        found[name], start = flat[:size].view(expected[name]), end
    return {name: found[name] for name in expected}


def _scales(blocks: Tensor) -> Tensor:
    """The largest size in each block, rounded up to bfloat16 [n]: no ratio to it is over 1.

    0 for a block that is too small to tell; infinite, which no receiver takes, for one that is too large or not finite.
    """
    peaks = blocks.abs().amax(dim=1) if len(blocks) else torch.zeros(0)
    peaks = torch.where(peaks <= MOST, peaks, torch.inf)  # NaN is not
    peaks = torch.where(peaks >= LEAST, peaks, 0.0)
    upper = (peaks.view(torch.int32) + 0xFFFF) >> 16
    return upper.to(torch.int16).view(torch.bfloat16)


def _rounded(ratios: Tensor, precision: str, generator: torch.Generator) -> Tensor:
    """Codes: each ratio becomes one of its two neighbours on the grid, and its mean is the ratio."""
    steps: Tensor | float = 1.0
    if precision == "fp16":  # 11 significant bits, and 2⁻²⁴ at least
        exponents = torch.frexp(ratios).exponent
        steps = torch.ldexp(torch.ones_like(ratios), (exponents - 11).clamp(min=-24))
    scaled = ratios / steps  # by a power of 2, so exact
    lower = scaled.floor()
    up = torch.rand(ratios.shape, generator=generator) < scaled - lower
    return (lower + up) * steps


def _packed(codes: Tensor, precision: str) -> bytes:
    match precision:
        case "fp16":
            return _bytes(codes.half())
        case "int8":
            return _bytes(codes.to(torch.int8))
    nibbles = codes.to(torch.int8).view(-1, 2) & 0xF
    return _bytes((nibbles[:, 0] | nibbles[:, 1] << 4).view(torch.uint8))


def _unpacked(data: bytearray, start: int, precision: str) -> Tensor:
    """Codes as float32 [n, 64]; a code that `encode` never writes stays too large."""
    match precision:
        case "fp16":
            codes = torch.frombuffer(data, dtype=torch.float16, offset=start)
        case "int8":
            codes = torch.frombuffer(data, dtype=torch.int8, offset=start)
        case _:
            pairs = torch.frombuffer(data, dtype=torch.int8, offset=start)
            codes = torch.stack([pairs << 4 >> 4, pairs >> 4], dim=1)  # both keep the sign
    return codes.float().view(-1, BLOCK)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
