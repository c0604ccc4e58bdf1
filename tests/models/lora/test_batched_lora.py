"""Compare slots with a loop over examples, and rows with explicit layouts."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from models.lora.adapter import Adapter, Factors, Site, Sites, concatenate, init_adapter, split_rank
from models.lora.batched_lora import (
    BatchedFactors,
    Layout,
    SlotConv2d,
    SlotLayer,
    SlotLinear,
    add_slots,
    select_slots,
    set_adapters,
    slot_layers,
    stack_adapters,
    to_device,
)
from models.quantization.blockwise import dequantize, quantize
from models.quantization.layers import QuantizedConv2d, QuantizedLinear
from tests.helpers.adapters import random_adapter

SITES = {"one": Site(5, 7), "two": Site(3, 2), "kernel": Site(12, 4, (3, 2))}


def random_stack(slots: int, rank: int, inputs: int, outputs: int) -> BatchedFactors:
    return BatchedFactors(
        torch.randn(slots, rank, inputs, dtype=torch.float64, requires_grad=True),
        torch.randn(slots, outputs, rank, dtype=torch.float64, requires_grad=True),
    )


def with_merged_weights(layer: nn.Linear | nn.Conv2d, x: Tensor, stacks: Sequence[BatchedFactors]) -> Tensor:
    """Run each example through a layer with its slot's products merged into the weight."""
    outputs = []
    for entry in range(len(x)):
        weight = layer.weight
        for stack in stacks:
            slot = entry // (len(x) // len(stack.a))
            weight = weight + (stack.b[slot] @ stack.a[slot]).view_as(weight)
        row = x[entry : entry + 1]
        if isinstance(layer, nn.Linear):
            outputs.append(F.linear(row, weight, layer.bias))
        else:
            outputs.append(F.conv2d(row, weight, layer.bias, layer.stride, layer.padding, layer.dilation))
    return torch.cat(outputs)


def check(slotted: SlotLayer, x: Tensor, stacks: Sequence[BatchedFactors]) -> None:
    """Compare output and gradients of all factors and the input with the loop."""
    x = x.detach().requires_grad_()
    slotted.active_adapters = tuple(stacks)
    actual, expected = slotted(x), with_merged_weights(slotted.base, x, stacks)
    torch.testing.assert_close(actual, expected)
    leaves = [x, *(factor for stack in stacks for factor in stack)]
    cotangent = torch.randn_like(expected)
    pairs = zip(
        torch.autograd.grad(actual, leaves, cotangent), torch.autograd.grad(expected, leaves, cotangent), strict=True
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)


@given(
    slots=st.lists(st.sampled_from([1, 3]), min_size=1, max_size=3),
    per_slot=st.integers(1, 3),
    between=st.lists(st.integers(1, 3), max_size=2),
    rank=st.integers(0, 3),
    bias=st.booleans(),
)
def test_slot_linear_equals_merged_weights(
    slots: list[int], per_slot: int, between: list[int], rank: int, bias: bool
) -> None:
    layer = nn.Linear(5, 7, bias=bias, dtype=torch.float64)
    x = torch.randn(max(slots) * per_slot, *between, 5, dtype=torch.float64)
    check(SlotLinear(layer), x, [random_stack(count, rank, 5, 7) for count in slots])


@given(
    kernel=st.sampled_from([(1, 1), (3, 3), (3, 1)]),
    stride=st.integers(1, 3),
    padding=st.sampled_from([0, 1, 2, "same"]),
    dilation=st.integers(1, 2),
    slots=st.lists(st.sampled_from([1, 2]), min_size=1, max_size=2),
    per_slot=st.integers(1, 3),
    rank=st.integers(1, 3),
    channels_last=st.booleans(),
)
def test_slot_conv2d_equals_merged_weights(
    kernel: tuple[int, int],
    stride: int,
    padding: int | str,
    dilation: int,
    slots: list[int],
    per_slot: int,
    rank: int,
    channels_last: bool,
) -> None:
    if padding == "same":  # supports no other stride
        stride = 1
    layer = nn.Conv2d(3, 4, kernel, stride, padding, dilation, dtype=torch.float64)
    x = torch.randn(max(slots) * per_slot, 3, 7, 6, dtype=torch.float64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    check(SlotConv2d(layer), x, [random_stack(count, rank, layer.weight[0].numel(), 4) for count in slots])


def test_other_slots_have_no_gradient() -> None:
    x = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    slotted, stack = SlotConv2d(nn.Conv2d(3, 4, 3, dtype=torch.float64)), random_stack(3, 2, 27, 4)
    slotted.active_adapters = (stack,)
    (a,) = torch.autograd.grad(slotted(x)[2:4].square().sum(), stack.a)  # slot 1
    assert a[1].abs().sum() > 0
    assert a[0].eq(0).all()
    assert a[2].eq(0).all()


@pytest.mark.parametrize(
    ("slotted", "x"),
    [
        (SlotLinear(nn.Linear(5, 7)), torch.zeros(3, 5)),
        (SlotLinear(nn.Linear(5, 7)), torch.zeros(3, 2, 5)),  # the number of tokens, six, is divisible by two slots
        (SlotConv2d(nn.Conv2d(5, 7, 1)), torch.zeros(3, 5, 2, 2)),
    ],
)
def test_uneven_batch_is_refused(slotted: SlotLayer, x: Tensor) -> None:
    slotted.active_adapters = (BatchedFactors(torch.zeros(2, 1, 5), torch.zeros(2, 7, 1)),)
    with pytest.raises(RuntimeError, match="unflatten"):
        slotted(x)


@pytest.mark.parametrize(
    ("layer", "quantized", "shape"),
    [(nn.Linear(5, 7), QuantizedLinear, (4, 5)), (nn.Conv2d(3, 4, 3, padding=1), QuantizedConv2d, (4, 3, 5, 5))],
)
@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_quantized_layers_support_slots(layer: nn.Module, quantized: type, shape: tuple[int, ...], bits: str) -> None:
    layer = copy.deepcopy(layer)
    small = quantized(layer, quantize(layer.weight, bits))
    layer = layer.double()
    with torch.no_grad():
        layer.weight.copy_(dequantize(small.packed, small.shape, torch.float64))
    kind = SlotLinear if isinstance(layer, nn.Linear) else SlotConv2d
    slotted, x = kind(small.double()), torch.randn(shape, dtype=torch.float64)
    stack = random_stack(2, 2, layer.weight[0].numel(), len(layer.weight))
    slotted.active_adapters = (stack,)
    torch.testing.assert_close(slotted(x), with_merged_weights(layer, x, [stack]), rtol=1e-6, atol=1e-6)


def test_add_slots_and_set_adapters() -> None:
    network = nn.Sequential(
        nn.Linear(5, 5), nn.ModuleDict({"inner": nn.Linear(5, 5)}), nn.ModuleList([nn.Linear(5, 5)])
    )
    sites = {"1.inner": Site(5, 5), "2.0": Site(5, 5)}
    plain = network[1]["inner"]
    add_slots(network, sites)
    layers = slot_layers(network)
    assert set(layers) == set(sites)
    assert layers["1.inner"].base is plain
    full, empty = (stack_adapters(sites, [random_adapter(sites, rank)]) for rank in (1, 0))
    set_adapters(layers, [full, {"1.inner": full["1.inner"]}, empty, {}])
    assert {name: len(layer.active_adapters) for name, layer in layers.items()} == {"1.inner": 2, "2.0": 1}
    x = torch.randn(3, 5)
    set_adapters(layers, [])
    assert torch.equal(layers["1.inner"](x), plain(x))


RANKS = st.dictionaries(st.sampled_from(list(SITES)), st.integers(0, 4))


def expected_row(sites: Sites, rank: int, adapter: Adapter, fill: float | None = None) -> list[float]:
    """Build the row element by element: A padded below, B padded to the right, in site order."""
    row: list[float] = []
    for name, site in sites.items():
        a, b = torch.zeros(rank, site.inputs), torch.zeros(site.outputs, rank)
        for column in range(adapter[name].a.shape[0] if name in adapter else 0):
            a[column] = adapter[name].a[column] if fill is None else fill
            b[:, column] = adapter[name].b[:, column] if fill is None else fill
        row += [*a.flatten().tolist(), *b.flatten().tolist()]
    return row


@given(ranks=RANKS, rank=st.integers(4, 5), start=st.booleans())
def test_pack_unpack_and_mask(ranks: dict[str, int], rank: int, start: bool) -> None:
    adapter = random_adapter(SITES, ranks)
    if start:  # B = 0: its zeros are not padding
        adapter = {name: f._replace(b=torch.zeros_like(f.b)) for name, f in adapter.items()}
    layout = Layout(SITES, rank)
    row = layout.pack(adapter)
    assert row.shape == (layout.size,)
    assert row.tolist() == expected_row(SITES, rank, adapter)
    assert layout.mask(adapter).tolist() == [bool(value) for value in expected_row(SITES, rank, adapter, fill=1.0)]
    assert layout.fits(adapter) == (ranks == dict.fromkeys(SITES, rank))
    back = layout.unpack(row, adapter)
    row.zero_()
    assert set(back) == set(adapter)
    for name, factors in back.items():
        assert torch.equal(factors.a, adapter[name].a)
        assert torch.equal(factors.b, adapter[name].b)
        assert factors.a.is_contiguous()
        assert factors.b.is_contiguous()


@pytest.mark.parametrize("rank", [0, 3])
def test_pack_ignores_site_order(rank: int) -> None:
    adapter = random_adapter(SITES, dict.fromkeys(reversed(SITES), rank))
    layout = Layout(SITES, rank)
    assert layout.fits(adapter)
    assert layout.pack(adapter).tolist() == expected_row(SITES, rank, adapter)
    assert layout.mask(adapter).all()
    back = layout.unpack(layout.pack(adapter), adapter)
    assert all(torch.equal(back[name].b, adapter[name].b) for name in SITES)


def test_pack_none_is_zero() -> None:
    layout = Layout(SITES, 2)
    for nothing in (None, {}):
        assert torch.equal(layout.pack(nothing), torch.zeros(2 * (5 + 7 + 3 + 2 + 12 + 4)))
    assert not layout.mask({}).any()
    assert layout.unpack(torch.ones(layout.size), {}) == {}


def test_stacks_are_views_of_rows() -> None:
    layout, adapter = Layout(SITES, 2), random_adapter(SITES, 2, dtype=torch.float64)
    rows = torch.stack([torch.zeros(layout.size, dtype=torch.float64), layout.pack(adapter)])
    stacks = layout.stacks(rows)
    for name, factors in adapter.items():
        assert torch.equal(stacks[name].a[1], factors.a)
        assert torch.equal(stacks[name].b[1], factors.b)
    rows.zero_()
    assert all(factor.eq(0).all() for stack in stacks.values() for factor in stack)
    assert layout.pack(random_adapter(SITES, {"two": 1}, dtype=torch.float64)).dtype == torch.float64


def test_from_parts_equals_stacks() -> None:
    layout = Layout(SITES, 2)
    rows = torch.randn(3, layout.size)
    whole, parts = layout.stacks(rows), layout.from_parts(rows.split(layout.widths, dim=1))
    for name in SITES:
        assert torch.equal(whole[name].a, parts[name].a)
        assert torch.equal(whole[name].b, parts[name].b)


@given(ranks=st.lists(st.none() | RANKS, min_size=1, max_size=4))
def test_stacking_preserves_products(ranks: list[dict[str, int] | None]) -> None:
    adapters = [None if each is None else random_adapter(SITES, each, seed) for seed, each in enumerate(ranks)]
    stacks = stack_adapters(SITES, adapters)
    if all(adapter is None for adapter in adapters):
        assert stacks == {}
        return
    for name, site in SITES.items():
        assert stacks[name].a.shape[0] == len(adapters)
        for slot, adapter in enumerate(adapters):
            product = torch.zeros(site.outputs, site.inputs)
            if adapter and name in adapter:
                product = adapter[name].b @ adapter[name].a
            torch.testing.assert_close(stacks[name].b[slot] @ stacks[name].a[slot], product)


def test_shared_adapter_uses_one_slot() -> None:
    adapter = random_adapter(SITES, 2)
    for count in (1, 3):
        assert stack_adapters(SITES, [adapter] * count)["one"].a.shape[0] == 1
    equal = random_adapter(SITES, 2)
    assert stack_adapters(SITES, [adapter, equal])["one"].a.shape[0] == 2
    assert stack_adapters(SITES, []) == {}


def test_select_slots() -> None:
    adapters = [random_adapter(SITES, 2, seed) for seed in range(3)]
    selected = select_slots(stack_adapters(SITES, adapters), torch.tensor([2, 0, 2, 1]))
    for name in SITES:
        for slot, seed in enumerate([2, 0, 2, 1]):
            assert torch.equal(selected[name].a[slot], adapters[seed][name].a)
            assert torch.equal(selected[name].b[slot], adapters[seed][name].b)
    everyone = stack_adapters(SITES, adapters[:1])
    assert select_slots(everyone, torch.zeros(4, dtype=torch.long)) == everyone
    assert select_slots({}, torch.zeros(4, dtype=torch.long)) == {}


def test_to_device_changes_dtype() -> None:
    stacks = stack_adapters(SITES, [random_adapter(SITES, 2)])
    moved = to_device(stacks, torch.empty(0, dtype=torch.bfloat16))
    assert {factor.dtype for stack in moved.values() for factor in stack} == {torch.bfloat16}
    assert torch.equal(moved["one"].a, stacks["one"].a.bfloat16())


def test_mask_includes_zero_factors() -> None:
    layout = Layout(SITES, 2)
    assert layout.mask(init_adapter(SITES, 2, 0)).all()


def test_concatenate_and_split_rank() -> None:
    one, two = random_adapter(SITES, 2, 0), random_adapter(SITES, {"one": 3, "kernel": 0}, 1)
    both = concatenate([one, two])
    head, tail = split_rank(both, 2)
    for name, site in SITES.items():
        other = two.get(name, Factors(torch.zeros(0, site.inputs), torch.zeros(site.outputs, 0)))
        torch.testing.assert_close(both[name].b @ both[name].a, one[name].b @ one[name].a + other.b @ other.a)
        assert torch.equal(head[name].a, one[name].a)
        assert torch.equal(tail[name].b, other.b)
