"""Compare quantized layers with plain layers that have the dequantized weight."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from models.quantization import blockwise as quantise_module
from models.quantization.blockwise import QuantizedTensor, dequantize, empty_quantized, quantize
from models.quantization.layers import QuantizedConv2d, QuantizedLayer, QuantizedLinear


def pair(layer: nn.Linear | nn.Conv2d, kind: str) -> tuple[QuantizedLayer, nn.Module]:
    """Return the quantized layer, and a plain one with the dequantized weight in float64."""
    wrapper = QuantizedLinear if isinstance(layer, nn.Linear) else QuantizedConv2d
    quantized, plain = wrapper(layer, quantize(layer.weight, kind)).double(), copy.deepcopy(layer).double()
    with torch.no_grad():
        plain.weight.copy_(dequantize(quantized.packed, layer.weight.shape, torch.float64))
    return quantized, plain.requires_grad_(False)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("slab", [64, 1 << 22])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(48, 70), (3, 5, 48)),
        (nn.Linear(48, 70, bias=False), (3, 48)),
        (nn.Linear(6, 4), (2, 3, 2, 6)),
        (nn.Conv2d(6, 40, 3, stride=2, padding=1), (2, 6, 7, 7)),
        (nn.Conv2d(6, 9, (3, 1), padding=(2, 0), dilation=(2, 1), bias=False), (2, 6, 8, 5)),
        (nn.Conv2d(32, 8, 1), (1, 32, 3, 3)),
    ],
)
def test_equals_dequantized_layer(
    layer: nn.Linear | nn.Conv2d, shape: tuple[int, ...], kind: str, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.quantization.blockwise._SLAB", {"cpu": slab})
    quantized, plain = pair(layer, kind)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y, expected = quantized(x), plain(x)
    torch.testing.assert_close(y, expected)
    for cotangent in (torch.randn_like(y), torch.ones((), dtype=torch.float64).expand_as(y)):
        (actual,) = torch.autograd.grad(y, x, cotangent, retain_graph=True)
        torch.testing.assert_close(actual, torch.autograd.grad(expected, x, cotangent, retain_graph=True)[0])
    with torch.no_grad():
        torch.testing.assert_close(quantized(x.mT.contiguous().mT), expected)


@pytest.mark.parametrize("layer", [nn.Linear(256, 256), nn.Conv2d(64, 64, 3)])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_autograd_saves_only_codes(layer: nn.Linear | nn.Conv2d, kind: str) -> None:
    quantized, _ = pair(layer, kind)
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    shape = (1, 256) if isinstance(layer, nn.Linear) else (1, 64, 5, 5)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        quantized(torch.randn(shape, dtype=torch.float64, requires_grad=True))
    assert {tensor.data_ptr() for tensor in saved} == {tensor.data_ptr() for tensor in quantized.packed}


def test_output_has_activation_dtype() -> None:
    layer = nn.Linear(64, 64)
    quantized = QuantizedLinear(layer, quantize(layer.weight, "nf4"))
    before = [tensor.clone() for tensor in quantized.packed]
    quantized.to(torch.bfloat16)
    assert all(torch.equal(one, other) for one, other in zip(quantized.packed, before, strict=True))
    assert quantized(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_scratch_survives_fake_tensors(kind: str) -> None:
    """Scratch memory must not be shared between a dry run and real runs."""
    layer = nn.Linear(96, 64)
    expected = QuantizedLinear(layer, quantize(layer.weight, kind))(torch.ones(2, 96))
    for precision in (torch.float32, torch.float64):
        quantise_module._pairs.cache_clear()
        with FakeTensorMode():
            plain = nn.Linear(96, 64)
            parts = (torch.empty_like(part, device="cpu") for part in empty_quantized(kind, 96 * 64))
            dry = QuantizedLinear(plain, QuantizedTensor(*parts)).to(precision)
            x = torch.ones(2, 96, dtype=precision, requires_grad=True)
            (actual,) = torch.autograd.grad(dry(x).sum(), x)
            assert actual.shape == x.shape
        real = QuantizedLinear(layer, quantize(layer.weight, kind))
        torch.testing.assert_close(real(torch.ones(2, 96)), expected)


@pytest.mark.integration
@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11),
    reason="compiled only on a GPU; dynamo of 2.9 can't trace it",
)
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("layer", [nn.Linear(64, 64), nn.Conv2d(32, 32, 3)])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_compiled_equals_eager(layer: nn.Linear | nn.Conv2d, kind: str) -> None:
    quantized, _ = pair(layer, kind)
    shape = (3, 64) if isinstance(layer, nn.Linear) else (1, 32, 5, 5)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    torch.compiler.reset()
    actual, expected = torch.compile(quantized, backend="aot_eager", fullgraph=True)(x), quantized(x)
    torch.testing.assert_close(actual, expected)
    pairs = (torch.autograd.grad(output.square().sum(), x)[0] for output in (actual, expected))
    torch.testing.assert_close(*pairs)
