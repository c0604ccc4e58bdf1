"""The codec decodes its own encodings, and nothing else."""

import json
import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from models.lora.adapter import Site, adapter_shapes, from_tensors, init_adapter, to_tensors
from protocol.tensor_codec import CodecError, decode, encode, max_payload

TENSORS = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor([1.5, -2.0])}
EXPECTED = {"a": (2,), "b": (2, 3)}


def entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


GOOD = {"a": entry([2], 0, 8), "b": entry([2, 3], 8, 32)}


HUGE = 10**4000
NESTED = "[" * 900 + "]" * 900  # as deep as a parser allows, and deeper than repr does


def make_payload(header, data=bytes(32)):
    """Bytes with any header, padded as the format requires."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def test_roundtrip_keeps_values_and_order():
    result = decode(encode(TENSORS), EXPECTED)
    assert list(result) == ["a", "b"]
    assert all(torch.equal(result[name], TENSORS[name]) for name in TENSORS)
    result["a"].zero_()  # the result is writable


def test_known_header_does_not_skip_checks():
    data = encode(TENSORS)
    for _ in range(2):
        assert torch.equal(decode(data, EXPECTED)["b"], TENSORS["b"])
        with pytest.raises(CodecError, match="b: contains NaN"):
            decode(encode({**TENSORS, "b": torch.full((2, 3), math.nan)}), EXPECTED)
        with pytest.raises(CodecError, match="payload holds 36 bytes"):
            decode(data + bytes(4), EXPECTED, free=100)
        with pytest.raises(CodecError, match="b: shape"):
            decode(data, {"a": (2,), "b": (3, 2)})
        with pytest.raises(CodecError, match="dtype must be F16"):
            decode(data, EXPECTED, dtype=torch.float16)
    first, second = (decode(data, EXPECTED)["a"] for _ in range(2))
    first.zero_()
    assert torch.equal(second, TENSORS["a"])


def test_bytes_are_canonical_safetensors():
    assert encode(TENSORS) == encode(dict(sorted(TENSORS.items())))
    assert torch.equal(load(encode(TENSORS))["b"], TENSORS["b"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "tensors",
    [
        {},
        TENSORS,
        {"scalar": torch.tensor(1.5), "none": torch.zeros(2, 0), 'é"\n\x01\x7f': torch.ones(3).double()},
        {"turned": torch.arange(6.0).view(2, 3).T, "trained": torch.ones(2, requires_grad=True)},
    ],
)
def test_bytes_match_safetensors(tensors, dtype):
    plain = {name: tensors[name].detach().to(dtype).contiguous() for name in sorted(tensors)}
    assert encode(tensors, dtype=dtype) == save(plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    result = decode(encode(TENSORS, dtype=dtype), EXPECTED, dtype=dtype)
    assert result["b"].dtype == dtype
    assert torch.equal(result["b"].float(), TENSORS["b"])
    with pytest.raises(CodecError, match="dtype must be F32"):
        decode(encode(TENSORS, dtype=dtype), EXPECTED)


def test_unknown_rank_is_consistent():
    sites = {"x": Site(5, 3), "y": Site(4, 4)}
    adapter = init_adapter(sites, 2, seed=0)
    data = encode(to_tensors(adapter))
    result = from_tensors(decode(data, adapter_shapes(sites, -1)))
    assert torch.equal(result["x"].a, adapter["x"].a)
    assert result["y"].b.shape == (4, 2)
    mixed = encode(to_tensors({"x": adapter["x"], "y": init_adapter(sites, 3, seed=0)["y"]}))
    with pytest.raises(CodecError, match=r"y\.lora_A: shape must be \[2, 4\], is \[3, 4\]"):
        decode(mixed, adapter_shapes(sites, -1))
    with pytest.raises(CodecError, match="shape"):
        decode(encode(to_tensors(init_adapter(sites, 0, seed=0))), adapter_shapes(sites, -1))


@pytest.mark.parametrize("size", [3, 10**6, HUGE, 0, -1])
def test_unknown_size_is_bounded(size):
    expected = {"a": (-1, 2)}
    assert decode(encode({"a": torch.ones(2, 2)}), expected, free=2)["a"].shape == (2, 2)
    with pytest.raises(CodecError, match=r"instead of 1 to 2|non-negative"):
        decode(make_payload({"a": entry([size, 2], 0, 16)}, bytes(16)), expected, free=2)


@given(st.integers(1, 9), st.integers(1, 9))
def test_max_payload_is_a_bound(rank, most):
    sites = {"x": Site(5, 3), "y": Site(4, 4)}
    data = encode(to_tensors(init_adapter(sites, rank, seed=0)))
    if rank <= most:
        assert (
            len(data) <= max_payload(adapter_shapes(sites, rank)) <= max_payload(adapter_shapes(sites, -1), free=most)
        )
    numbers = most * (5 + 3 + 4 + 4)
    assert max_payload(adapter_shapes(sites, -1), free=most) == 8 + 65_536 + 4 * 200 + 4 * numbers


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40))
def test_subnormal_numbers_become_zero(numbers):
    values = np.array(numbers, np.float32)
    result = decode(encode({"a": torch.from_numpy(values)}), {"a": values.shape})["a"].numpy()
    assert np.array_equal(result, np.where(np.abs(values) < np.finfo(np.float32).tiny, 0, values))


def test_long_payload_is_checked_completely():
    """It is checked in chunks."""
    values = torch.ones(200_000)
    values[[0, 70_000, -1]] = 1e-40
    result = decode(encode({"a": values}), {"a": (200_000,)})["a"]
    assert torch.equal(result.eq(0).nonzero().ravel(), torch.tensor([0, 70_000, 199_999]))
    for index in (0, 70_000, -1):
        with pytest.raises(CodecError, match="a: contains NaN"):
            decode(encode({"a": torch.ones(200_000).index_fill(0, torch.tensor(index), math.nan)}), {"a": (200_000,)})


def test_truncated_at_every_byte():
    data = encode(TENSORS)
    for length in range(len(data)):
        with pytest.raises(CodecError):
            decode(data[:length], EXPECTED)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (make_payload(GOOD) + b"\0", "holds 33 bytes"),
        (make_payload(GOOD, b""), "holds 0 bytes"),
        (make_payload({"a": GOOD["a"]}), "b: missing"),
        (make_payload(GOOD | {"c": entry([0], 32, 32)}), "'c': not expected"),
        (make_payload(GOOD | {"../../x": entry([0], 32, 32)}), "not expected"),
        (make_payload(GOOD | {"__metadata__": {}}), "'__metadata__': not expected"),
        (make_payload(json.dumps(GOOD)[:-1].encode() + b', "a": {}}'), "'a' is duplicated"),
        (make_payload(b'{"a": {"dtype": "F32", "dtype": "F32"}}'), "'dtype' is duplicated"),
        (make_payload(GOOD | {"a": entry([2], 0, 8, "F64")}), "a: dtype must be F32, is 'F64'"),
        (make_payload(GOOD | {"a": entry([1, 2], 0, 8)}), "a: shape"),
        (make_payload(GOOD | {"a": entry([2.0], 0, 8)}), "a: shape must be a list of non-negative integers"),
        (make_payload(GOOD | {"a": entry([True], 0, 8)}), "a: shape must be a list"),
        (make_payload(GOOD | {"a": entry([-2], 0, 8)}), "a: shape must be a list"),
        (make_payload(GOOD | {"a": entry([1] * 10_000, 0, 8)}), "a: shape"),
        (make_payload(GOOD | {"b": entry([2, 3], 0, 24)}), "data_offsets must be"),
        (make_payload(GOOD | {"b": entry([2, 3], 16, 40)}, bytes(40)), "data_offsets must be"),
        (make_payload(GOOD | {"a": {"dtype": "F32"}}), "a: entry must hold"),
        (make_payload(GOOD | {"a": None}), "a: entry must hold"),
        (make_payload(b"[]"), "not a JSON object"),
        (make_payload(b"[" * 50_000), "nested too deeply"),
        (make_payload(b'{"a": NaN}'), "NaN is not a JSON number"),
        (make_payload(b"\xff\xff"), "not JSON"),
        (make_payload(json.dumps(GOOD).encode().ljust(65_944), b""), "too long for 2 tensors"),
        (make_payload({f"x{i}": entry([0], 0, 0) for i in range(10_000)}), "the maximum is 65976"),
        (make_payload(GOOD, bytes(2**20)), "the maximum is 65976"),
        (make_payload(GOOD | {"__metadata__": {"a": "x" * 5_000_000}}), "the maximum is 65976"),
        (make_payload(GOOD | {"a\nb": entry([0], 32, 32)}), r"'a\\nb': not expected"),
        (make_payload(GOOD | {"\ud800": entry([0], 32, 32)}), r"'\\ud800': not expected"),
        (make_payload(json.dumps(GOOD).replace('"F32"', NESTED, 1).encode()), "dtype must be F32, is list"),
        (make_payload(GOOD | {"a": entry([HUGE], 0, 8)}), r"a: shape must be \[2\], is \[10{90,}"),
        (make_payload(GOOD | {"b": entry([2, 3], 8, HUGE)}), "data_offsets must be"),
        (make_payload(json.dumps(GOOD).replace("[2]", "[" + "9" * 5000 + "]").encode()), "not JSON: Exceeds the limit"),
        (struct.pack("<Q", 2**63) + bytes(100), "too long"),
        (struct.pack("<Q", 3) + b"{}  ", "not padded"),
    ],
)
def test_invalid_payload_is_rejected(data, message):
    with pytest.raises(CodecError, match=message) as caught:
        decode(data, EXPECTED)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_values_are_rejected(value):
    with pytest.raises(CodecError, match="a: contains NaN or infinite"):
        decode(encode(TENSORS | {"a": torch.tensor([0.0, value])}), EXPECTED)


def test_flipped_bit_is_rejected_or_changes_values():
    data = encode(TENSORS)
    for position in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        try:
            result = decode(bytes(flipped), EXPECTED)
        except CodecError:
            continue
        assert {name: tuple(tensor.shape) for name, tensor in result.items()} == EXPECTED


@given(st.binary(max_size=200))
def test_arbitrary_bytes_never_crash(data):
    with pytest.raises(CodecError):
        decode(data, EXPECTED)


@given(st.binary(max_size=200))
def test_arbitrary_headers_never_crash(text):
    with pytest.raises(CodecError):
        decode(make_payload(text), EXPECTED)


def test_encode_rejects_unsupported_dtype():
    with pytest.raises(ValueError, match="dtype"):
        encode(TENSORS, dtype=torch.float64)
