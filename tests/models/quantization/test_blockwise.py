"""Compare codes and scales with numpy: values are exact, and their error is minimal over all scales."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models.quantization.blockwise import BLOCK_SIZES, dequantize, empty_quantized, iter_slabs, quantize

NF4 = np.array(
    [
        -1.0,
        -0.6961928,
        -0.5250731,
        -0.3949175,
        -0.2844414,
        -0.1847734,
        -0.09105,
        0.0,
        0.0795803,
        0.1609302,
        0.2461123,
        0.3379152,
        0.4407098,
        0.562617,
        0.7229568,
        1.0,
    ]
)
"""Appendix E of arXiv:2305.14314, rounded."""

kinds = pytest.mark.parametrize("kind", ["nf4", "int8"])


def levels(kind: str) -> np.ndarray:
    return NF4 if kind == "nf4" else np.arange(-127, 128) / 127


def as_numpy(codes: Tensor, scales: Tensor, top: Tensor, count: int) -> np.ndarray:
    """Dequantize packed tensors block by block."""
    largest, actual = top.numpy().view(np.float32)[0], []
    for block, step in zip(codes.numpy().reshape(len(scales), -1), scales.tolist(), strict=True):
        scale = largest * 2.0 ** (-step / 16)
        values = NF4[np.stack([block >> 4, block & 15], 1).ravel()] if block.dtype == np.uint8 else block / 127
        actual.append(values * scale)
    return np.concatenate(actual)[:count]


@kinds
@given(
    shape=st.sampled_from([(1, 1), (3, 5), (2, 64), (7, 3, 3, 3), (33, 48), (5, 32, 1, 1), (1, 200)]),
    magnitude=st.sampled_from([0.0, 1e-30, 1.0, 1e6]),
    seed=st.integers(0, 9),
)
def test_dequantize_matches_codes(kind: str, shape: tuple[int, ...], magnitude: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).mul_(magnitude)
    packed = quantize(weight, kind)
    assert packed.quant_type == kind
    expected = as_numpy(*packed, weight.numel()).reshape(shape)
    for dtype in (torch.float32, torch.float64):
        actual = dequantize(packed, weight.shape, dtype)
        assert actual.dtype == dtype
        np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-5, atol=0)
    for tensor, meant in zip(packed, empty_quantized(kind, weight.numel()), strict=True):
        assert (tensor.dtype, tensor.shape) == (meant.dtype, meant.shape)


@kinds
@pytest.mark.parametrize("tail", [False, True])
def test_scale_has_least_error(kind: str, tail: bool) -> None:
    """Try every scale for each block with nearest levels; blocks differ in magnitude."""
    generator, size = np.random.default_rng(0), BLOCK_SIZES[kind]
    blocks = generator.standard_t(4, (30, size)) if tail else generator.normal(size=(30, size))
    weight = torch.from_numpy((blocks * 0.9 ** np.arange(30)[:, None]).astype(np.float32))
    actual = (dequantize(quantize(weight, kind), weight.shape) - weight).square().sum(1).numpy()
    best = np.full(30, np.inf)
    for scale in weight.abs().max().item() * 2.0 ** (-np.arange(256) / 16):
        codes = np.abs(weight.numpy()[..., None] / scale - levels(kind)).argmin(-1)
        best = np.minimum(best, np.square(levels(kind)[codes] * scale - weight.numpy()).sum(1))
    assert (actual >= best * 0.999).all()
    assert actual.sum() <= best.sum() * (1.03 if kind == "nf4" else 1.1)


def test_error_is_below_absmax_scaling() -> None:
    """NF4 at round-to-nearest has 8.7 % in blocks of 32 normal weights, and 9.2 % in blocks of 64."""
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    error = {
        kind: float((dequantize(quantize(weight, kind), weight.shape) - weight).norm()) / 512 for kind in BLOCK_SIZES
    }
    assert error["nf4"] < 0.081
    assert error["int8"] < 0.0062


@kinds
def test_small_blocks_are_not_zero(kind: str) -> None:
    weight = torch.ones(4, 64)
    weight[1] = 2.0**-14
    weight[2] = 2.0**-40  # below the smallest scale: rounds to zero
    weight[3] = 0.0
    actual = dequantize(quantize(weight, kind), weight.shape)
    torch.testing.assert_close(actual[:2], weight[:2], rtol=0.05, atol=0)
    assert (actual[2:] == 0).all()


@kinds
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_weight_dtype(kind: str, dtype: torch.dtype) -> None:
    weight = torch.randn(6, 40).to(dtype)
    for actual, expected in zip(quantize(weight, kind), quantize(weight.float(), kind), strict=True):
        assert torch.equal(actual, expected)
    read = dequantize(quantize(weight, kind), weight.shape, torch.bfloat16)
    expected = dequantize(quantize(weight, kind), weight.shape)
    assert (read.float() - expected).norm() < 2**-7 * expected.norm()


@kinds
@pytest.mark.parametrize("shape", [(70, 48), (9, 7, 3, 3), (4, 8192), (5, 1), (64, 64)])
def test_slabs_cover_whole_rows(kind: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(shape)
    packed = quantize(weight, kind)
    whole = dequantize(packed, weight.shape)
    monkeypatch.setattr("models.quantization.blockwise._SLAB", {"cpu": 1024})
    seen, row = 0, math.prod(shape[1:])
    for rows, slab in iter_slabs(packed, weight.shape, torch.float32):
        assert (rows.start, slab.shape[1:]) == (seen, weight.shape[1:])
        assert len(slab) * row <= max(1024, BLOCK_SIZES[kind] * row)
        assert torch.equal(slab, whole[rows])
        seen = rows.stop
    assert seen == shape[0]
