"""Quantization: rounding is unbiased and off by at most one step; the decoder accepts only valid encodings."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from protocol.quantization import BLOCK, MAX_SCALE, MIN_SCALE, PRECISIONS, decode, encode, max_payload
from protocol.tensor_codec import CodecError

TENSORS = {"b": torch.linspace(-1, 3, 132).view(2, 66), "a": torch.tensor([1.5, -2.0]), "none": torch.zeros(2, 0)}
EXPECTED = {"a": (2,), "b": (2, 66), "none": (2, 0)}
CODES = {"fp16": 128, "int8": 64, "int4": 32}  # bytes of a block
LEVELS = {"int8": 127, "int4": 7}

precisions = pytest.mark.parametrize("precision", PRECISIONS)
values = arrays.arrays(
    np.float32, st.integers(0, 150), elements=st.floats(-1e4, 1e4, width=32, allow_nan=False, allow_subnormal=True)
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def shapes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def roundtrip(tensors, precision, *, seed=0, keep=1.0):
    """Encode and decode tensors."""
    return decode(encode(tensors, precision, generator(seed), keep=keep), shapes(tensors), precision, keep=keep)


def grid_spacing(block, precision):
    """Grid spacing at each number, float64, computed with NumPy only."""
    block = np.asarray(block, np.float64)
    peak = np.abs(block).max(initial=0.0)
    if peak < MIN_SCALE:
        return np.full_like(block, MIN_SCALE)  # decoded as 0
    scale = peak * (1 + 2.0**-7)  # bfloat16 has 8 significant bits, and is rounded up
    if precision == "fp16":
        return scale * np.maximum(np.spacing(np.abs(block / peak).astype(np.float16)).astype(np.float64), 2.0**-24)
    return np.full_like(block, scale / LEVELS[precision])


@precisions
@given(numbers=values, seed=st.integers(0, 99))
def test_rounding_error_is_below_a_step(precision, numbers, seed):
    result = roundtrip({"x": torch.from_numpy(numbers)}, precision, seed=seed)["x"].numpy()
    assert result.shape == numbers.shape
    for start in range(0, len(numbers), BLOCK):
        block = numbers[start : start + BLOCK].astype(np.float64)
        error = np.abs(result[start : start + BLOCK] - block)
        assert (error <= grid_spacing(block, precision) * (1 + 1e-6)).all()


@precisions
@given(numbers=st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=5))
def test_rounding_is_unbiased(precision, numbers):
    """The mean of many roundings differs from the number by at most 6 standard errors."""
    many = 400
    row = np.zeros(BLOCK, np.float32)
    row[: len(numbers)] = numbers
    result = roundtrip({"x": torch.from_numpy(np.tile(row, (many, 1)))}, precision)["x"].double().mean(dim=0).numpy()
    step = grid_spacing(row, precision)
    assert (np.abs(result - row) <= 6 * 0.5 * step / math.sqrt(many) + 1e-6 * np.abs(row) + MIN_SCALE).all()


@given(numbers=arrays.arrays(np.float16, BLOCK, elements=st.floats(-1, 1, width=16)))
def test_halves_in_a_unit_block_are_exact(numbers):
    numbers[0] = 1.0
    tensor = torch.from_numpy(numbers.astype(np.float32))
    assert torch.equal(roundtrip({"x": tensor}, "fp16")["x"], tensor)


@pytest.mark.parametrize(("precision", "levels"), LEVELS.items())
def test_whole_levels_are_exact(precision, levels):
    numbers = torch.arange(-levels, levels + 1.0) / levels * 2
    assert torch.allclose(roundtrip({"x": numbers[:BLOCK]}, precision)["x"], numbers[:BLOCK], rtol=1e-6, atol=0)


@precisions
@pytest.mark.parametrize(
    "tensors",
    [
        {},
        TENSORS,
        {"scalar": torch.tensor(1.5)},
        {"none": torch.zeros(0)},
        {"zeros": torch.zeros(3, 70)},
        {"turned": torch.arange(6.0).view(2, 3).T, "trained": torch.ones(2, requires_grad=True).double()},
    ],
)
def test_names_shapes_and_order_are_kept(precision, tensors):
    expected = dict(sorted(shapes(tensors).items(), reverse=True))
    data = encode(tensors, precision, generator())
    result = decode(data, expected, precision)
    assert shapes(result) == expected
    assert list(result) == list(expected)
    assert data == encode(dict(reversed(tensors.items())), precision, generator())
    for name, tensor in tensors.items():
        assert torch.allclose(result[name], tensor.detach().float(), atol=0.75, rtol=0)


@precisions
def test_payload_length_and_empty_blocks(precision):
    full = encode(TENSORS, precision, generator())
    assert len(full) == max_payload(EXPECTED, precision) == 4 * (2 + CODES[precision])  # a has 1 block, b has 3
    still = encode(TENSORS | {"b": torch.zeros(2, 66)}, precision, generator())
    assert len(still) == 4 * 2 + CODES[precision]


def test_int4_takes_four_and_a_quarter_bits():
    assert max_payload({"x.lora_A": (8, 320), "x.lora_B": (320, 8)}, "int4") * 8 == 4.25 * 2 * 2560


@precisions
@given(keep=st.floats(0.01, 1.0))
def test_largest_blocks_are_kept(precision, keep):
    rows = torch.arange(1.0, 11)[torch.randperm(10, generator=generator())]
    tensors = {"x": rows[:, None].expand(10, BLOCK)}
    result = roundtrip(tensors, precision, keep=keep)["x"][:, 0]
    kept = math.ceil(keep * 10)
    assert sorted(rows[result != 0].tolist()) == list(range(11 - kept, 11))
    assert len(encode(tensors, precision, generator(), keep=keep)) == max_payload({"x": (10, 64)}, precision, keep=keep)


@precisions
def test_error_feedback_sends_everything_eventually(precision):
    """The sum of all sent changes equals the sum of the true ones, except for the last quantization error."""
    change, left, total = torch.linspace(-1, 1, 640) ** 3, torch.zeros(640), torch.zeros(640)
    for number in range(20):
        result = roundtrip({"x": change + left}, precision, seed=number, keep=0.3)["x"]
        left = change + left - result
        total += result
    assert torch.allclose(total + left, 20 * change, atol=1e-4)
    assert left.norm() < 8 * change.norm()  # 20 rounds with a third of the blocks leave only a few changes


@precisions
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2 * MAX_SCALE])
def test_non_finite_and_large_values_are_rejected(precision, value):
    for index in (0, 40, 131):
        tensors = TENSORS | {"b": TENSORS["b"].flatten().index_fill(0, torch.tensor(index), value).view(2, 66)}
        with pytest.raises(CodecError, match="a scale is not 0"):
            roundtrip(tensors, precision)


@precisions
@pytest.mark.parametrize("scale", [0x7F80, 0xFF80, 0x7FC0, 0x7FFF, 0x8000, 0xBF80, 0x0001, 0x4780 + 1])
def test_invalid_scales_are_rejected(precision, scale):
    """±∞, NaN, −0, −1, a subnormal number, and one over 2¹⁶."""
    data = bytearray(encode(TENSORS, precision, generator()))
    data[2:4] = scale.to_bytes(2, "little")
    with pytest.raises(CodecError, match="a scale is not 0"):
        decode(bytes(data), EXPECTED, precision)


@pytest.mark.parametrize(
    ("precision", "code"),
    [
        ("int8", b"\x80"),
        ("int4", b"\x08"),
        ("int4", b"\x80"),
        ("fp16", b"\x00\x7e"),
        ("fp16", b"\x00\xfc"),
        ("fp16", b"\x01\x3c"),
    ],
)
def test_invalid_codes_are_rejected(precision, code):
    """−128, −8 in either half, NaN, −∞, and slightly over 1."""
    data = bytearray(encode(TENSORS, precision, generator()))
    data[8 : 8 + len(code)] = code
    with pytest.raises(CodecError, match=f"a code of {precision}"):
        decode(bytes(data), EXPECTED, precision)


@precisions
def test_padding_must_be_zero(precision):
    data = bytearray(encode(TENSORS, precision, generator()))
    data[8 + CODES[precision] - 1] = 0x11  # the last number of a's only block
    with pytest.raises(CodecError, match="a: the padding"):
        decode(bytes(data), EXPECTED, precision)


@precisions
def test_wrong_length_is_rejected(precision):
    data = encode(TENSORS, precision, generator())
    other = [data[:length] for length in range(len(data))] + [data + bytes(count) for count in (1, CODES[precision])]
    for result in (*other, data + bytes(2**20)):
        with pytest.raises(CodecError):
            decode(result, EXPECTED, precision)
    with pytest.raises(CodecError, match="bytes of codes for 3 blocks"):
        decode(b"\0\0" + data[2:], EXPECTED, precision)
    with pytest.raises(CodecError, match="expected 8 to"):
        decode(data, EXPECTED, precision, keep=0.5)
    with pytest.raises(CodecError):
        decode(encode({"a": torch.ones(3)}, precision, generator()), {}, precision)


@precisions
def test_huge_shapes_allocate_nothing(precision):
    with pytest.raises(CodecError, match="payload of 10 bytes"):
        decode(bytes(10), {"x": (2**31, 2**31)}, precision)


@precisions
@given(data=st.binary(max_size=8 + 4 * 128))
def test_arbitrary_bytes_never_crash(precision, data):
    try:
        result = decode(data, EXPECTED, precision)
    except CodecError:
        return
    assert all(bool(tensor.abs().le(MAX_SCALE).all()) for tensor in result.values())


@precisions
def test_flipped_bit_is_rejected_or_changes_values(precision):
    data = encode(TENSORS, precision, generator())
    for position in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        try:
            result = decode(bytes(flipped), EXPECTED, precision)
        except CodecError:
            continue
        assert shapes(result) == EXPECTED
        numbers = torch.cat([tensor.flatten() for tensor in result.values()])
        assert numbers.isfinite().all()
        assert not ((numbers != 0) & (numbers.abs() < torch.finfo(torch.float32).tiny)).any()
