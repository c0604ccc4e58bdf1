"""Quantised layers against plain ones that have the weight which the codes stand for."""

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
    """The layer quantised, and a plain one with the same weight, in float64."""
    wrapper = QuantizedLinear if isinstance(layer, nn.Linear) else QuantizedConv2d
    ours, plain = wrapper(layer, quantize(layer.weight, kind)).double(), copy.deepcopy(layer).double()
    with torch.no_grad():
        plain.weight.copy_(dequantize(ours.packed, layer.weight.shape, torch.float64))
    return ours, plain.requires_grad_(False)


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
def test_output_and_gradient_are_those_of_the_dequantised_layer(
    layer: nn.Linear | nn.Conv2d, shape: tuple[int, ...], kind: str, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.quantization.blockwise._SLAB", {"cpu": slab})
    ours, plain = pair(layer, kind)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y, wanted = ours(x), plain(x)
    torch.testing.assert_close(y, wanted)
    for cotangent in (torch.randn_like(y), torch.ones((), dtype=torch.float64).expand_as(y)):
        (found,) = torch.autograd.grad(y, x, cotangent, retain_graph=True)
        torch.testing.assert_close(found, torch.autograd.grad(wanted, x, cotangent, retain_graph=True)[0])
    with torch.no_grad():
        torch.testing.assert_close(ours(x.mT.contiguous().mT), wanted)


@pytest.mark.parametrize("layer", [nn.Linear(256, 256), nn.Conv2d(64, 64, 3)])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_autograd_keeps_no_floating_point_weight(layer: nn.Linear | nn.Conv2d, kind: str) -> None:
    ours, _ = pair(layer, kind)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    shape = (1, 256) if isinstance(layer, nn.Linear) else (1, 64, 5, 5)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ours(torch.randn(shape, dtype=torch.float64, requires_grad=True))
    assert {tensor.data_ptr() for tensor in kept} == {tensor.data_ptr() for tensor in ours.packed}


def test_precision_is_of_activations_and_not_of_scales() -> None:
    layer = nn.Linear(64, 64)
    ours = QuantizedLinear(layer, quantize(layer.weight, "nf4"))
    before = [tensor.clone() for tensor in ours.packed]
    ours.to(torch.bfloat16)
    assert all(torch.equal(one, other) for one, other in zip(ours.packed, before, strict=True))
    assert ours(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_run_without_data_leaves_nothing_behind(kind: str) -> None:
    """What is kept between calls must not come from a dry run, nor go into one."""
    layer = nn.Linear(96, 64)
    wanted = QuantizedLinear(layer, quantize(layer.weight, kind))(torch.ones(2, 96))
    for precision in (torch.float32, torch.float64):
        quantise_module._pairs.cache_clear()
        with FakeTensorMode():
            plain = nn.Linear(96, 64)
            parts = (torch.empty_like(part, device="cpu") for part in empty_quantized(kind, 96 * 64))
            dry = QuantizedLinear(plain, QuantizedTensor(*parts)).to(precision)
            x = torch.ones(2, 96, dtype=precision, requires_grad=True)
            (found,) = torch.autograd.grad(dry(x).sum(), x)
            assert found.shape == x.shape
        real = QuantizedLinear(layer, quantize(layer.weight, kind))
        torch.testing.assert_close(real(torch.ones(2, 96)), wanted)


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11),
    reason="compiled on a GPU alone; dynamo of 2.9 can't trace it",
)
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("layer", [nn.Linear(64, 64), nn.Conv2d(32, 32, 3)])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_compiled_it_is_the_same(layer: nn.Linear | nn.Conv2d, kind: str) -> None:
    ours, _ = pair(layer, kind)
    shape = (3, 64) if isinstance(layer, nn.Linear) else (1, 32, 5, 5)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    torch.compiler.reset()
    found, wanted = torch.compile(ours, backend="aot_eager", fullgraph=True)(x), ours(x)
    torch.testing.assert_close(found, wanted)
    pairs = (torch.autograd.grad(output.square().sum(), x)[0] for output in (found, wanted))
    torch.testing.assert_close(*pairs)
