"""Quantization of an adapter's change: blocks of 64 numbers with a scale each, stochastically rounded without bias.

A number x of a block with scale s ≥ max |x| lies between two neighbors on the grid of its precision. It is rounded to
the upper one with the probability for which the mean is x (stochastic rounding; QSGD, Alistarh et al., 2017,
arXiv:1610.02132, §3.1). The grid spacing is s/127 in int8, s/7 in int4, and that of half precision in fp16. The sender
may add the rounding error to its next change (error feedback; Seide et al., 2014; Karimireddy et al., 2019,
arXiv:1901.09847). A block with scale 0 takes the space of its scale only: an unchanged factor costs a quarter of a bit
per number, and a sender may defer its smallest blocks to a later change (top-k by blocks).

The receiver knows all names and shapes, so they are not sent:

    scales    bfloat16, one per block, tensors by name, each padded with zeros to whole blocks
    codes     of the blocks with nonzero scale: 64 halves, 64 bytes, or 32 bytes with the first number in the low bits

For any bytes, the decoded numbers are finite, at most `MAX_SCALE` in size, and not subnormal. Further bounds are up to
the receiver: `models.lora.norm_bound` in general, and the server's clip for device-level privacy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from protocol.tensor_codec import CodecError, Shape

BLOCK = 64  # numbers that share a scale
MIN_SCALE, MAX_SCALE = 2.0**-64, 2.0**16
"""Range of a nonzero scale."""

_LEVELS = {"fp16": 1, "int8": 127, "int4": 7}  # the largest code
_CODE_BYTES = {"fp16": 2 * BLOCK, "int8": BLOCK, "int4": BLOCK // 2}
_SCALE_BYTES = 2
PRECISIONS = tuple(_LEVELS)


def encode(tensors: Mapping[str, Tensor], precision: str, generator: torch.Generator, *, keep: float = 1.0) -> bytes:
    """Quantize tensors to `precision`. Equal tensors and an equal generator give equal bytes.

    Values that are not finite, or over `MAX_SCALE`, are encoded so that every receiver rejects them.

    Args:
        tensors: tensors by name.
        precision: `fp16`, `int8` or `int4`.
        generator: source of the stochastic rounding.
        keep: fraction of all blocks that is sent, those with the largest norms; the others are decoded as 0.
    """
    levels = _LEVELS[precision]
    blocks = _blocks({name: tensors[name].shape for name in tensors}, tensors)
    if keep < 1:
        smallest = blocks.square().sum(dim=1).argsort(stable=True)[: len(blocks) - _sent_blocks(len(blocks), keep)]
        blocks[smallest] = 0.0
    scales = _scales(blocks)
    sent = scales > 0
    ratios = (blocks[sent] / scales[sent, None].float() * levels).nan_to_num(0.0, 0.0, 0.0)
    return _bytes(scales) + _pack(_stochastic_round(ratios, precision, generator), precision)


def decode(data: bytes, expected: Mapping[str, Shape], precision: str, *, keep: float = 1.0) -> dict[str, Tensor]:
    """Decode tensors with exactly these names and shapes.

    The length is compared with `expected` before anything is allocated, and every scale is checked before any code.

    Args:
        data: the payload.
        expected: expected shapes by name.
        precision: `fp16`, `int8` or `int4`.
        keep: fraction of the blocks that may be sent.

    Returns:
        Tensors, float32, in the order of `expected`.

    Raises:
        CodecError: `data` is not the result of `encode` for such tensors.
    """
    blocks, code_bytes = _block_count(expected), _CODE_BYTES[precision]
    min_bytes, max_bytes = _SCALE_BYTES * blocks, max_payload(expected, precision, keep=keep)
    if not min_bytes <= len(data) <= max_bytes or (len(data) - min_bytes) % code_bytes:
        raise CodecError(f"payload of {len(data)} bytes, expected {min_bytes} to {max_bytes} in steps of {code_bytes}")
    if not blocks:
        return {name: torch.zeros(shape) for name, shape in expected.items()}
    buffer = bytearray(data)
    scales = torch.frombuffer(buffer, dtype=torch.bfloat16, count=blocks).float()
    sent = scales.view(torch.int32) != 0  # encode never writes −0
    if not (scales[sent].ge(MIN_SCALE) & scales[sent].le(MAX_SCALE)).all():
        raise CodecError(f"a scale is not 0, nor {MIN_SCALE:g} to {MAX_SCALE:g}")
    if int(sent.sum()) * code_bytes != len(data) - min_bytes:
        raise CodecError(f"{len(data) - min_bytes} bytes of codes for {int(sent.sum())} blocks of {code_bytes}")
    values = torch.zeros(blocks, BLOCK)
    if sent.any():
        codes = _unpack(buffer, min_bytes, precision)
        if not (codes.abs() <= _LEVELS[precision]).all():  # rejects NaN too
            raise CodecError(f"a code of {precision} is over {_LEVELS[precision]}")
        values[sent] = codes * (scales[sent, None] / _LEVELS[precision])
    return _tensors(values, expected)


def max_payload(expected: Mapping[str, Shape], precision: str, *, keep: float = 1.0) -> int:
    """Return the length in bytes of the longest payload for these shapes; only blocks of zeros make it shorter.

    Args:
        expected: expected shapes by name.
        precision: `fp16`, `int8` or `int4`.
        keep: fraction of the blocks that may be sent.
    """
    blocks = _block_count(expected)
    return _SCALE_BYTES * blocks + _CODE_BYTES[precision] * _sent_blocks(blocks, keep)


def bytes_per_number(precision: str, keep: float = 1.0) -> float:
    """Return the average bytes per number, in complete blocks."""
    return (_SCALE_BYTES + keep * _CODE_BYTES[precision]) / BLOCK


def _block_count(shapes: Mapping[str, Shape]) -> int:
    return sum(-(-math.prod(shape) // BLOCK) for shape in shapes.values())


def _sent_blocks(blocks: int, keep: float) -> int:
    return math.ceil(keep * blocks)


def _blocks(shapes: Mapping[str, Shape], tensors: Mapping[str, Tensor]) -> Tensor:
    """Pad each tensor, by name, to whole blocks [n, 64], float32. The result is a copy."""
    rows = [torch.zeros(0, BLOCK)]
    for name in sorted(shapes):
        flat = tensors[name].detach().to("cpu", torch.float32).reshape(-1)
        rows.append(F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK))
    return torch.cat(rows)


def _tensors(blocks: Tensor, expected: Mapping[str, Shape]) -> dict[str, Tensor]:
    """Unpack blocks to tensors in the order of `expected`, the inverse of `_blocks`."""
    unpacked, start = {}, 0
    for name in sorted(expected):
        size = math.prod(expected[name])
        end = start + -(-size // BLOCK)
        flat = blocks[start:end].view(-1)
        if flat[size:].any():
            raise CodecError(f"{name}: the padding of its last block is not 0")
        unpacked[name], start = flat[:size].view(expected[name]), end
    return {name: unpacked[name] for name in expected}


def _scales(blocks: Tensor) -> Tensor:
    """Return the maximum absolute value of each block, rounded up to bfloat16 [n], so that no ratio exceeds 1.

    It is 0 for a block of tiny numbers, and infinite, which receivers reject, for one that is too large or not finite.
    """
    peaks = blocks.abs().amax(dim=1) if len(blocks) else torch.zeros(0)
    peaks = torch.where(peaks <= MAX_SCALE, peaks, torch.inf)  # NaN is not
    peaks = torch.where(peaks >= MIN_SCALE, peaks, 0.0)
    upper = (peaks.view(torch.int32) + 0xFFFF) >> 16
    return upper.to(torch.int16).view(torch.bfloat16)


def _stochastic_round(ratios: Tensor, precision: str, generator: torch.Generator) -> Tensor:
    """Round each ratio to one of its two neighbors on the grid, so that the mean is the ratio."""
    steps: Tensor | float = 1.0
    if precision == "fp16":  # 11 significant bits; the spacing is at least 2⁻²⁴
        exponents = torch.frexp(ratios).exponent
        steps = torch.ldexp(torch.ones_like(ratios), (exponents - 11).clamp(min=-24))
    scaled = ratios / steps  # exact, by a power of 2
    lower = scaled.floor()
    up = torch.rand(ratios.shape, generator=generator) < scaled - lower
    return (lower + up) * steps


def _pack(codes: Tensor, precision: str) -> bytes:
    match precision:
        case "fp16":
            return _bytes(codes.half())
        case "int8":
            return _bytes(codes.to(torch.int8))
    nibbles = codes.to(torch.int8).view(-1, 2) & 0xF
    return _bytes((nibbles[:, 0] | nibbles[:, 1] << 4).view(torch.uint8))


def _unpack(data: bytearray, start: int, precision: str) -> Tensor:
    """Return codes as float32 [n, 64]. Codes that `encode` never writes keep their value, so that they are rejected."""
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
