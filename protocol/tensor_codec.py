"""A strict codec for named tensors: safetensors bytes from untrusted senders.

safetensors itself accepts duplicate keys, any number of empty tensors, any dtype and NaN. Here the receiver specifies
the expected tensors, and everything that can be checked on the header is checked before anything is allocated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from common.errors import AntherError
from common.strict_json import loads
from common.subnormals import without_subnormals

_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_HEADER_BYTES = 64 * 1024
_HEADER_BYTES_PER_TENSOR = 200
_FREE = -1
_MAX_FREE = 2**16
_CHUNK = 2**16  # numbers that are checked at a time, so that the memory for it doesn't grow with the payload

Shape = tuple[int, ...]


class _Layout(NamedTuple):
    """Positions of the tensors in the data, derived from a valid header."""

    sizes: tuple[int, ...]
    """Numbers of each tensor, in the order of the data."""
    tensors: tuple[tuple[str, int, Shape], ...]
    """Name, index in `sizes`, and shape, in the order in which they are expected."""


class CodecError(AntherError):
    """The bytes are not a valid encoding of the expected tensors; names the key."""


def encode(tensors: Mapping[str, Tensor], *, dtype: torch.dtype = torch.float32) -> bytes:
    """Encode tensors, cast to `dtype`, as safetensors. Equal tensors give equal bytes, in any order."""
    if dtype not in _DTYPES:
        raise ValueError(f"{dtype=}: must be one of {list(_DTYPES)}")
    names = sorted(tensors)
    header = _encode_header(dtype, tuple([(name, tensors[name].shape) for name in names]))
    if not names:
        return header
    with torch.no_grad():
        values = _flatten_dense_tensors([tensors[name] for name in names]).to("cpu", dtype)
    return b"".join([header, values.view(torch.uint8).numpy().data])


@lru_cache(maxsize=16)
def _encode_header(dtype: torch.dtype, shapes: tuple[tuple[str, Shape], ...]) -> bytes:
    """Return the header's bytes, cached since the replies of a fleet have the same header."""
    header, position = {}, 0
    for name, shape in shapes:
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": (position, end)}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def max_payload(expected: Mapping[str, Shape], *, free: int = _MAX_FREE, dtype: torch.dtype = torch.float32) -> int:
    """Return the length in bytes of the longest payload that `decode` accepts for these shapes.

    Longer payloads can be rejected unread.

    Args:
        expected: expected shapes by name; -1 for an unknown size.
        free: maximum of the unknown size.
        dtype: expected dtype.
    """
    numbers = sum(math.prod(free if size == _FREE else size for size in shape) for shape in expected.values())
    return 8 + _longest_header(len(expected)) + numbers * dtype.itemsize


def decode(
    data: bytes, expected: Mapping[str, Shape], *, free: int = _MAX_FREE, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Decode tensors with exactly the expected names, shapes and dtype, all of them finite.

    A size of -1 stands for one unknown number from 1 to `free`, the same wherever it appears: the rank of an adapter
    whose sites are known (`models.lora.adapter.adapter_shapes(sites, -1)`). The tensors share one writable copy of
    `data`, in which subnormal numbers are replaced by 0: they carry no information, and arithmetic with them takes a
    hundred times as long.

    Args:
        data: the payload.
        expected: expected shapes by name.
        free: maximum of the unknown size.
        dtype: expected dtype.

    Returns:
        Tensors in the order of `expected`.

    Raises:
        CodecError: `data` is not the result of `encode` for such tensors.
    """
    if len(data) > (limit := max_payload(expected, free=free, dtype=dtype)):
        raise CodecError(f"payload of {len(data)} bytes, the maximum is {limit}")
    header = _header(data, len(expected))
    start = 8 + len(header)
    layout = _layout(header, tuple(expected.items()), free, dtype, len(data) - start)
    buffer = bytearray(data)
    values = torch.frombuffer(buffer, dtype=dtype, offset=start) if len(data) > start else torch.empty(0, dtype=dtype)
    parts = values.split(layout.sizes) if layout.sizes else ()
    tensors = {name: parts[index].view(shape) for name, index, shape in layout.tensors}
    if not _finite(values):
        raise CodecError(
            f"{next(name for name, t in tensors.items() if not _finite(t))}: contains NaN or infinite values"
        )
    for part in values.split(_CHUNK):
        part.copy_(without_subnormals(part))
    return tensors


def _finite(values: Tensor) -> bool:
    """Return whether all values are finite. It makes no copy: with a NaN, both extremes are NaN."""
    return not values.numel() or all(math.isfinite(extreme) for extreme in values.aminmax())


def _longest_header(tensors: int) -> int:
    return _HEADER_BYTES + _HEADER_BYTES_PER_TENSOR * tensors


def _header(data: bytes, tensors: int) -> bytes:
    """Return the header's JSON, which the data follows."""
    if len(data) < 8:
        raise CodecError(f"payload of {len(data)} bytes is too short for a header")
    length = int.from_bytes(data[:8], "little")
    if length > _longest_header(tensors):
        raise CodecError(f"header of {length} bytes is too long for {tensors} tensors")
    if length > len(data) - 8 or length % 8:  # the format pads it, so that tensors are aligned
        raise CodecError(f"header of {length} bytes is cut off or not padded to 8")
    return data[8 : 8 + length]


@lru_cache(maxsize=16)
def _layout(text: bytes, expected: tuple[tuple[str, Shape], ...], free: int, dtype: torch.dtype, total: int) -> _Layout:
    """Parse and check a header. Cached by its bytes, since the replies of a fleet have the same header.

    Args:
        text: the header's JSON.
        expected: expected names and shapes.
        free: maximum of the unknown size.
        dtype: expected dtype.
        total: bytes of data after the header.
    """
    try:
        header = loads(text.decode())
    except ValueError as error:
        raise CodecError(f"header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise CodecError("header is not a JSON object")
    shapes = dict(expected)
    _check_keys(header, shapes)
    resolved = _resolve(header, shapes, free)
    order = _check_layout(header, resolved, dtype, total)
    index_of = {name: index for index, name in enumerate(order)}
    return _Layout(
        sizes=tuple(math.prod(resolved[name]) for name in order),
        tensors=tuple((name, index_of[name], shape) for name, shape in resolved.items()),
    )


def _check_keys(header: Mapping[str, object], expected: Mapping[str, Shape]) -> None:
    if missing := sorted(expected.keys() - header.keys()):
        raise CodecError(f"{missing[0]}: missing")
    if extra := sorted(header.keys() - expected.keys()):  # also __metadata__, which is not used here
        raise CodecError(f"{extra[0][:100]!r}: not expected")
    for name, entry in header.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise CodecError(f"{name}: entry must hold dtype, shape and data_offsets")
        for key in ("shape", "data_offsets"):
            if not isinstance(entry[key], list) or any(type(n) is not int or n < 0 for n in entry[key]):
                raise CodecError(f"{name}: {key} must be a list of non-negative integers")


def _resolve(header: Mapping, expected: Mapping[str, Shape], limit: int) -> dict[str, Shape]:
    """Return the expected shapes with the unknown size filled in, after comparing them with the header's."""
    free: int | None = None
    sizes = {}
    for name, shape in expected.items():
        declared = tuple(header[name]["shape"])
        for size, expected_size in zip(declared, shape, strict=False):
            if expected_size == _FREE and free is None:
                if not 0 < size <= limit:
                    raise CodecError(f"{name}: shape holds {_describe(size)} instead of 1 to {limit}")
                free = size
        sizes[name] = tuple(free if expected_size == _FREE and free else expected_size for expected_size in shape)
        if declared != sizes[name]:
            raise CodecError(f"{name}: shape must be {list(sizes[name])}, is {_describe(list(declared[:8]))}")
    return sizes


def _check_layout(header: Mapping, sizes: Mapping[str, Shape], dtype: torch.dtype, total: int) -> list[str]:
    """Return the names in the order of the data. Tensors must be contiguous, without overlap, and cover the data."""
    position = 0
    order = sorted(sizes, key=lambda name: header[name]["data_offsets"])
    for name in order:
        entry = header[name]
        if entry["dtype"] != _DTYPES[dtype]:
            raise CodecError(f"{name}: dtype must be {_DTYPES[dtype]}, is {_describe(entry['dtype'])}")
        end = position + math.prod(sizes[name]) * dtype.itemsize
        if entry["data_offsets"] != [position, end]:
            raise CodecError(
                f"{name}: data_offsets must be {[position, end]}, are {_describe(entry['data_offsets'][:4])}"
            )
        position = end
    if position != total:
        raise CodecError(f"payload holds {total} bytes of data, its header declares {position}")
    return order


def _describe(value: object) -> str:
    """Describe an untrusted value in one log line. A list may be nested deeper than repr supports."""
    numbers = isinstance(value, list) and all(type(n) is int for n in value)
    return ascii(value)[:100] if numbers or isinstance(value, str | int) else type(value).__name__
