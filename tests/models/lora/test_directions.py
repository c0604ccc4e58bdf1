"""Directions and coefficients against their definition, and the form in which they are sent."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.lora.adapter import Adapter, Factors, Site
from models.lora.directions import (
    CoefficientLayout,
    combine,
    count,
    divide,
    extend,
    init_directions,
    outer_change,
    personal_adapter,
    principal_directions,
    without_zero_rank,
)

SITES = {"first": Site(5, 4), "second": Site(3, 6)}


def shared_adapter(rank: int, seed: int = 0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: Factors(
            torch.randn(rank, site.inputs, generator=generator), torch.randn(site.outputs, rank, generator=generator)
        )
        for name, site in SITES.items()
    }


def product(adapter: Adapter, name: str) -> torch.Tensor:
    return adapter[name].b @ adapter[name].a


@given(rank=st.integers(1, 4), number=st.integers(1, 5))
def test_sent_form_keeps_product_and_directions(rank: int, number: int) -> None:
    shared = shared_adapter(rank)
    directions = init_directions(shared, number, seed=3, scale=0.5)
    sent = extend(shared, directions)
    again, received = divide(sent, number)
    for name in SITES:
        assert sent[name].a.shape[0] == rank * (1 + number) == sent[name].b.shape[1]
        torch.testing.assert_close(product(sent, name), product(shared, name))
        assert torch.equal(again[name].a, shared[name].a)
        assert torch.equal(again[name].b, shared[name].b)
        assert torch.equal(received[name], directions[name])
        assert torch.equal(without_zero_rank(sent)[name].a, shared[name].a)


def test_division_refuses_other_ranks() -> None:
    with pytest.raises(ValueError, match="not a multiple"):
        divide(shared_adapter(4), 2)


def test_zero_rank_is_removed_only_if_no_site_uses_it() -> None:
    adapter = shared_adapter(3)
    adapter["first"].a[1] = 0
    assert without_zero_rank(adapter) is adapter
    adapter["second"].a[1] = 0
    assert [len(factors.a) for factors in without_zero_rank(adapter).values()] == [2, 2]
    for factors in adapter.values():
        factors.a[:] = 0
    assert [len(factors.a) for factors in without_zero_rank(adapter).values()] == [1, 1]


def test_personal_adapter_is_the_weighted_sum() -> None:
    shared = shared_adapter(2)
    directions = init_directions(shared, 3, seed=1, scale=1.0)
    coefficients = torch.tensor([0.5, 0.0, -2.0])
    personal = personal_adapter(shared, directions, coefficients)
    for name in SITES:
        expected = (0.5 * directions[name][0] - 2 * directions[name][2]) @ shared[name].a
        torch.testing.assert_close(product(personal, name), expected)
    assert count(directions) == 3
    assert count({}) == 0


def test_initial_directions_depend_on_seed_and_site() -> None:
    shared = shared_adapter(2)
    first, same, other = (init_directions(shared, 2, seed=seed, scale=0.1) for seed in (1, 1, 2))
    assert torch.equal(first["first"], same["first"])
    assert not torch.equal(first["first"], other["first"])


def test_change_of_directions_is_their_gradient_step() -> None:
    """Autograd on D gives c ⊗ the gradient of B, so one SGD step on B stands for one on D."""
    shared = shared_adapter(2)
    coefficients = torch.tensor([1.5, -0.5])
    directions = {n: d.requires_grad_() for n, d in init_directions(shared, 2, seed=1, scale=1.0).items()}
    b = {name: (shared[name].b + combine(directions[name], coefficients)) for name in SITES}
    for tensor in b.values():
        tensor.retain_grad()
    sum((tensor.sin() @ shared[name].a).sum() for name, tensor in b.items()).backward()
    before = {name: Factors(shared[name].a, tensor.detach()) for name, tensor in b.items()}
    after = {name: Factors(shared[name].a, b[name].detach() - 0.1 * b[name].grad) for name in SITES}
    for name, change in outer_change(coefficients, before, after).items():
        torch.testing.assert_close(change, -0.1 * directions[name].grad)


def test_principal_directions_recover_planted_ones() -> None:
    """People differ around another point than the shared B, and the span of the directions contains them."""
    shared = shared_adapter(2)
    planted = init_directions(shared, 2, seed=1, scale=1.0)
    coefficients = torch.randn(40, 2, generator=torch.Generator().manual_seed(0)) + torch.tensor([0.5, -1.0])
    people = [
        {name: Factors(a, b + combine(planted[name], row)) for name, (a, b) in shared.items()} for row in coefficients
    ]
    found = principal_directions(shared, people, 2)
    span = torch.cat([found[name].flatten(1) for name in SITES], dim=1)
    changes = torch.cat([combine(planted[name], coefficients).flatten(1) for name in SITES], dim=1)
    scores = torch.linalg.lstsq(span.T, changes.T).solution
    torch.testing.assert_close(scores.T @ span, changes, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scores @ scores.T / 40, torch.eye(2), atol=1e-3, rtol=0)
    first, _ = torch.linalg.eigh(changes.T.double() @ changes.double() / 40)
    torch.testing.assert_close(span.square().sum(1), first.flip(0)[:2].float(), atol=0, rtol=1e-4)


def test_common_change_is_a_direction() -> None:
    shared, change = shared_adapter(2), shared_adapter(2, seed=1)
    people = [{name: Factors(a, b + change[name].b) for name, (a, b) in shared.items()}] * 3
    found = principal_directions(shared, people, 1)
    for name in SITES:
        torch.testing.assert_close(found[name][0].abs(), change[name].b.abs(), atol=1e-5, rtol=1e-5)


def test_more_directions_than_people_are_refused() -> None:
    with pytest.raises(ValueError, match="of 3 people or more, not of 2"):
        principal_directions(shared_adapter(1), [shared_adapter(1), shared_adapter(1)], 3)


def test_layout_of_coefficients() -> None:
    shared = shared_adapter(2)
    directions = init_directions(shared, 3, seed=1, scale=1.0)
    layout = CoefficientLayout(SITES, 2, 3, like=torch.empty(0))
    layout.set_fixed(shared, directions)
    rows = torch.randn(4, 3, generator=torch.Generator().manual_seed(2))
    for name, factors in layout.stacks(rows).items():
        for slot, row in enumerate(rows):
            torch.testing.assert_close(factors.b[slot], combine(directions[name], row))
            assert torch.equal(factors.a[slot], shared[name].a)
    unpacked = layout.unpack(rows[1], shared)
    torch.testing.assert_close(unpacked["second"].b, combine(directions["second"], rows[1]))
    assert layout.size == 3 == len(layout.pack(shared)) == int(layout.mask(shared).sum())
