"""Trained tensors of an adapter: round trips through messages and rows, compared with dense products and a loop."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.lora.adapter import Adapter, Factors, adapter_shapes, select_sites, split_rank
from models.lora.trainable import (
    TRAINED_TENSORS,
    PartialLayout,
    from_trained_tensors,
    trained_layout,
    trained_shapes,
    trained_tensors,
)
from tests.helpers.adapters import random_adapter
from tests.models.lora.test_lora_xs import SITES, random_bases

RANK = 4
kinds = pytest.mark.parametrize("trains", TRAINED_TENSORS)
SOME = st.sets(st.sampled_from(sorted(SITES)))


def random_cores(bases: Adapter, seed: int) -> Adapter:
    """Create an adapter with random cores in these bases."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: Factors(a, left @ torch.randn(len(a), len(a), generator=generator)) for name, (a, left) in bases.items()
    }


def random_case(trains: str, rank: int, seed: int) -> tuple[Adapter, Adapter, Adapter | None]:
    """Return the adapter that was sent, the trained one, and the bases."""
    if trains == "cores":
        bases = split_rank(random_bases(RANK, seed), rank)[0]
        return random_cores(bases, 1), random_cores(bases, 2), bases
    sent, trained = random_adapter(SITES, rank, 1), random_adapter(SITES, rank, 2)
    fixed = {"b": "a", "a": "b", "split": "b"}.get(trains)
    return (
        sent,
        {n: f._replace(**({fixed: getattr(sent[n], fixed)} if fixed else {})) for n, f in trained.items()},
        None,
    )


@kinds
@given(rank=st.integers(0, RANK), seed=st.integers(0, 100), sites=SOME)
def test_trained_tensors_round_trip(trains: str, rank: int, seed: int, sites: set[str]) -> None:
    sent, trained, bases = random_case(trains, rank, seed)
    result = trained_tensors(select_sites(trained, sites), trains, bases)
    selected = {name: SITES[name] for name in SITES if name in sites}
    assert {name: tuple(part.shape) for name, part in result.items()} == trained_shapes(selected, rank, trains)
    back = from_trained_tensors(result, trains, select_sites(sent, sites), bases)
    assert list(back) == list(selected)
    for name, pair in back.items():
        assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(pair, trained[name], strict=True))


@kinds
@given(rank=st.integers(0, RANK), seed=st.integers(0, 100), sites=SOME)
def test_partial_row_round_trip(trains: str, rank: int, seed: int, sites: set[str]) -> None:
    """Also for smaller ranks and some sites; the rest of the row is zero and masked."""
    whole, _, bases = random_case(trains, RANK, seed)
    trained = select_sites(split_rank(whole, rank)[0], sites)
    if trains == "cores":
        trained = select_sites(random_cores(split_rank(bases or {}, rank)[0], 2), sites)
    layout = trained_layout(SITES, RANK, trains, bases or whole)
    assert layout.size == sum(map(prod, trained_shapes(SITES, RANK, trains).values()))
    row = layout.pack(trained)
    parts = trained_tensors(trained, trains, split_rank(bases, rank)[0] if bases else None)
    assert row.norm() == pytest.approx(
        float(torch.cat([torch.zeros(0), *map(torch.ravel, parts.values())]).norm()), abs=1e-4
    )
    assert int(layout.mask(trained).sum()) == sum(part.numel() for part in parts.values())
    assert not row[~layout.mask(trained)].any()
    back = layout.unpack(row, trained)
    stacks = layout.stacks(torch.stack([row, 2 * row]))
    for name, (a, b) in trained.items():
        assert torch.allclose(back[name].a, a, atol=1e-5)
        assert torch.allclose(back[name].b, b, atol=1e-5)
        if trains != "both":
            assert torch.allclose(stacks[name].b[0, :, :rank] @ stacks[name].a[0, :rank], b @ a, atol=1e-4)
            twice = stacks[name].b[1, :, :rank] @ stacks[name].a[1, :rank]
            assert torch.allclose(twice, 2 * b @ a, atol=1e-4)


def test_set_fixed_replaces_everything() -> None:
    """Nothing of the previous adapter remains, even at other sites."""
    layout = PartialLayout(SITES, 3, "b", like=torch.empty(0))
    layout.set_fixed(random_adapter(SITES, 3, 1))
    layout.set_fixed(select_sites(random_adapter(SITES, 2, 2), {"a"}))
    assert torch.equal(layout.fixed["a"].a[0, :2], random_adapter(SITES, 2, 2)["a"].a)
    assert not layout.fixed["a"].a[0, 2:].any()
    assert not layout.fixed["b"].a.any()
    assert not layout.fixed["b"].b.any()


def test_both_uses_plain_layout() -> None:
    assert trained_shapes(SITES, 3, "both") == adapter_shapes(SITES, 3)
    assert [len(trained_shapes(SITES, 3, trains)) for trains in TRAINED_TENSORS] == [4, 2, 2, 2, 2]
