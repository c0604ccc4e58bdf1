import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from models.base import Base
from models.quantise import Int8Conv2d, Int8Linear, quantise, quantise_layers
from tests.tiny import ATTENTION


@given(rows=st.integers(1, 5), columns=st.integers(1, 9), magnitude=st.sampled_from([0.0, 1e-30, 1.0, 1e6]))
@settings(deadline=None, max_examples=40)
def test_error_is_at_most_half_a_step(rows: int, columns: int, magnitude: float) -> None:
    weight = torch.randn(rows, columns) * magnitude
    values, scale = quantise(weight)
    assert values.dtype == torch.int8
    assert scale.shape == (rows, 1)
    assert ((values * scale - weight).abs() <= scale * 0.5 * (1 + 1e-5)).all()


@pytest.mark.parametrize(
    ("layer", "quantised", "shape"),
    [
        (nn.Linear(6, 4), Int8Linear, (3, 5, 6)),
        (nn.Linear(6, 4, bias=False), Int8Linear, (3, 6)),
        (nn.Conv2d(6, 4, 3, stride=2, padding=1), Int8Conv2d, (2, 6, 7, 7)),
        (nn.Conv2d(6, 4, 1, groups=2), Int8Conv2d, (2, 6, 3, 3)),
    ],
)
def test_forward_and_backward_are_those_of_the_dequantised_layer(
    layer: nn.Module, quantised: type, shape: tuple
) -> None:
    ours = quantised(layer)
    with torch.no_grad():
        layer.weight.copy_(ours.values * ours.scale)
    x = torch.randn(shape, requires_grad=True)
    y, wanted = ours(x), layer(x)
    torch.testing.assert_close(y, wanted)
    cotangent = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, x, cotangent)
    torch.testing.assert_close(found, torch.autograd.grad(wanted, x, cotangent)[0])


def test_an_int8_base_is_close_and_keeps_its_sites(base: Base) -> None:
    small = Base(base.folder, sites=ATTENTION, weights="int8")
    x, t, context = torch.randn(2, *base.shape), torch.tensor([10, 700]), torch.randn(2, 8, 16)
    outputs = []
    for each in (base, small):
        with each.lending([]) as denoise, torch.no_grad():
            outputs.append(denoise(x, t, context))
    wanted, found = outputs
    assert 0 < (found - wanted).norm() / wanted.norm() < 0.05
    assert small.sites == base.sites
    assert list(small.sites) == list(base.sites)


def test_layers_are_replaced_where_that_saves_memory() -> None:
    network = nn.Sequential(
        nn.Linear(32, 32), nn.Linear(31, 33), nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.GroupNorm(2, 16))
    )
    quantise_layers(network)
    assert [type(layer) for layer in (*network[:2], *network[2])] == [Int8Linear, nn.Linear, Int8Conv2d, nn.GroupNorm]
    convolution = network[2][0]
    assert convolution.kernel_size == (3, 3)  # what a slot layer around it needs
    assert (convolution.stride, convolution.padding, convolution.dilation) == ((1, 1), (1, 1), (1, 1))
