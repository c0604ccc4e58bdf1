"""Compare the fused layer with two plain layers, and check the custom operator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models.lora.batched_linear import slot_linear


def arguments(bias: bool = True, rank: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
    """Draw x, W, c, A and B: two slots of two examples of three tokens."""
    shapes = [(4, 3, 5), (7, 5), (7,), (2, rank, 5), (2, 7, rank)]
    actual: list[Tensor | None] = [torch.randn(shape, dtype=dtype) for shape in shapes]
    return actual if bias else [*actual[:2], None, *actual[3:]]


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    parts = zip(x.chunk(len(a)), a, b, strict=True)
    return torch.cat([F.linear(part, weight, bias) + F.linear(F.linear(part, one), two) for part, one, two in parts])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("to_x", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "broadcast", "flat"])
def test_equals_two_separate_layers(bias: bool, rank: int, to_x: bool, layout: str) -> None:
    x, weight, c, a, b = arguments(bias, rank)
    match layout:
        case "transposed":
            x = x.mT.contiguous().mT
        case "broadcast":
            x = x[:, :1].expand_as(x)
        case "flat":
            x = x[:, 0]
    leaves = [x.requires_grad_(to_x), a.requires_grad_(), b.requires_grad_()][0 if to_x else 1 :]
    actual, expected = slot_linear(x, weight, c, a, b), plain(x, weight, c, a, b)
    torch.testing.assert_close(actual, expected)
    for cotangent in (torch.randn_like(expected), torch.ones(()).to(expected).expand_as(expected)):
        pairs = (torch.autograd.grad(output, leaves, cotangent, retain_graph=True) for output in (actual, expected))
        for gradient, reference in zip(*pairs, strict=True):
            torch.testing.assert_close(gradient, reference)


def test_bf16_rounds_no_more_than_two_layers() -> None:
    """Adding the thin product to the rounded wide one takes one extra rounding."""
    inputs = [torch.randn(shape).bfloat16() for shape in [(4, 64, 32), (48, 32), (48,), (2, 4, 32), (2, 48, 4)]]
    truth = plain(*(each.double() for each in inputs))
    errors = [(layer(*inputs).double() - truth).norm() for layer in (slot_linear, plain)]
    assert errors[0] <= errors[1] * 1.05
    assert slot_linear(*inputs).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("required", "compiled"), [*((parts, False) for parts in ("a", "b", "x", "xa", "xb")), ("xa", True), ("xb", True)]
)
def test_only_required_gradients_are_computed(required: str, compiled: bool) -> None:
    """Nothing is saved for the others: without A's gradient not x, without B's not A x."""
    x, weight, c, a, b = arguments()
    leaves = [part.requires_grad_() for name, part in (("x", x), ("a", a), ("b", b)) if name in required]
    layer, saved = slot_linear, []
    if compiled:
        torch.compiler.reset()
        layer = torch.compile(slot_linear, backend="aot_eager", fullgraph=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda part: saved.append(part.data_ptr()) or part, lambda part: part
    ):
        actual = layer(x, weight, c, a, b)
    pairs = (torch.autograd.grad(y.square().sum(), leaves) for y in (actual, plain(x, weight, c, a, b)))
    for gradient, reference in zip(*pairs, strict=True):
        torch.testing.assert_close(gradient, reference)
    assert compiled or (x.data_ptr() in saved) == ("a" in required)


@pytest.mark.integration
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("to_x", [False, True])
def test_custom_operator_passes_opcheck(bias: bool, to_x: bool) -> None:
    """Schema, fake tensors, and traced gradients, by torch's own check."""
    x, weight, c, a, b = arguments(bias)
    inputs = (x.requires_grad_(to_x), weight, c, a.requires_grad_(), b.requires_grad_())
    torch.library.opcheck(torch.ops.anther.slot_linear.default, inputs)
    grad, inner = torch.randn(4, 3, 7, dtype=torch.float64), torch.randn(2, 6, 2, dtype=torch.float64)
    detached = [each.detach() for each in (x, weight, a, b)]
    torch.library.opcheck(torch.ops.anther.slot_linear_backward.default, (grad, *detached, inner, to_x))


def test_compiled_equals_eager() -> None:
    x, weight, c, a, b = arguments()
    leaves = [x.requires_grad_(), a.requires_grad_(), b.requires_grad_()]
    torch.compiler.reset()
    actual = torch.compile(slot_linear, backend="aot_eager", fullgraph=True)(x, weight, c, a, b)
    expected = plain(x, weight, c, a, b)
    torch.testing.assert_close(actual, expected)
    pairs = (torch.autograd.grad(output.square().sum(), leaves) for output in (actual, expected))
    for gradient, reference in zip(*pairs, strict=True):
        torch.testing.assert_close(gradient, reference)
