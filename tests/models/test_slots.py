import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.adapter import Factors, Site, concatenate, head_and_tail, initial
from models.slots import Layout, Stack, slot_product, stack_adapters

SITES = {"one": Site(5, 7), "two": Site(3, 2)}


def random_adapter(rank: int, seed: int) -> dict[str, Factors]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: Factors(
            torch.randn(rank, site.inputs, generator=generator), torch.randn(site.outputs, rank, generator=generator)
        )
        for name, site in SITES.items()
    }


@given(slots=st.integers(1, 4), entries=st.integers(0, 5), tokens=st.integers(1, 3), rank=st.integers(1, 3))
@settings(deadline=None, max_examples=40)
def test_slot_product_is_a_loop_over_examples(slots: int, entries: int, tokens: int, rank: int) -> None:
    x = torch.randn(entries, tokens, 5)
    stack = Stack(torch.randn(slots, rank, 5), torch.randn(slots, 7, rank))
    index = torch.randint(0, slots, (entries,))
    wanted = [stack.b[s] @ (stack.a[s] @ row.T) for row, s in zip(x, index.tolist(), strict=True)]
    found = slot_product(x, stack, index)
    assert found.shape == (entries, tokens, 7)
    for row, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(row, want.T)


def test_two_dimensional_inputs_are_one_token() -> None:
    stack = Stack(torch.randn(2, 3, 5), torch.randn(2, 7, 3))
    x, index = torch.randn(4, 5), torch.tensor([0, 1, 1, 0])
    torch.testing.assert_close(slot_product(x, stack, index), slot_product(x[:, None], stack, index)[:, 0])


def test_pack_and_unpack_are_inverse_and_padding_is_zero() -> None:
    layout, adapter = Layout(SITES, 4), random_adapter(2, 0)
    row = layout.pack(adapter)
    assert row.shape == (layout.size,)
    assert (row[~layout.mask(adapter)] == 0).all()
    assert int(layout.mask(adapter).sum()) == 2 * (5 + 7 + 3 + 2)
    for name, factors in layout.unpack(row, adapter).items():
        assert torch.equal(factors.a, adapter[name].a)
        assert torch.equal(factors.b, adapter[name].b)


def test_mask_counts_zero_entries_of_an_adapter_too() -> None:
    layout = Layout(SITES, 2)
    assert layout.mask(initial(SITES, 2, 0)).all()  # B is zero at the start, and still trained


def test_stack_pads_to_the_largest_rank_and_serves_everyone_when_all_are_one() -> None:
    small, large = random_adapter(1, 0), random_adapter(3, 1)
    stacks = stack_adapters(SITES, [small, None, large])
    for name in SITES:
        assert stacks[name].a.shape[:2] == (3, 3)
        torch.testing.assert_close(stacks[name].b[0] @ stacks[name].a[0], small[name].b @ small[name].a)
        assert (stacks[name].a[1] == 0).all()
    assert stack_adapters(SITES, [small, small])["one"].a.shape[0] == 1
    assert stack_adapters(SITES, [None, None]) == {}


def test_concatenation_adds_products_and_splitting_keeps_them() -> None:
    one, two = random_adapter(2, 0), random_adapter(3, 1)
    both = concatenate([one, two])
    head, tail = head_and_tail(both, 2)
    for name in SITES:
        torch.testing.assert_close(both[name].b @ both[name].a, one[name].b @ one[name].a + two[name].b @ two[name].a)
        assert torch.equal(head[name].a, one[name].a)
        assert torch.equal(tail[name].b, two[name].b)
