"""Rebased updates of older adapters against dense matrices."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from client.rounds.handler import handle
from client.rounds.scheduler import run_handlers
from models.lora.adapter import Adapter, Factors, init_adapter
from strategies.aggregation.exact import Exact
from strategies.aggregation.fedit import FedIT
from strategies.fedbuff import PLANS_PER_ROUND, plan_number, rebase_factors, rebase_product, staleness_weight
from strategies.robust.robust_aggregation import RobustAggregation
from strategies.robust.trimmed import Median
from tests.helpers.devices import Performer, cache_epsilon, make_device, train_request
from tests.helpers.fleet import SITES


def adapter(rank: int, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: Factors(a, torch.randn(len(b), rank, generator=generator))
        for name, (a, b) in init_adapter(SITES, rank, seed).items()
    }


def dense(result: Adapter, site: str, rank: int | None = None) -> torch.Tensor:
    a, b = result[site]
    return b.double()[:, :rank] @ a.double()[:rank]


RANKS = st.integers(1, 4)


@given(RANKS, RANKS, RANKS, st.lists(st.integers(0, 9), min_size=1, max_size=3))
def test_rebase_product_adds_scaled_changes(rank_now, before, rank, ages):
    """Δ = Σ s(τ) (B_k A_k − B_v A_v) / K over the directions that a device trained."""
    rank = min(rank_now, before, rank)
    current, started = adapter(rank_now, 1), adapter(before, 2)
    trained = [adapter(rank, 3 + index) for index in range(len(ages))]
    rebased = [
        rebase_product(current, started, each, staleness_weight(age)) for each, age in zip(trained, ages, strict=True)
    ]
    after = Exact(rank=1, max_rank=None, seed=0).aggregate(current, [(each, 1.0) for each in rebased], round=1).adapter
    for site in SITES:
        moved = sum(
            (dense(each, site) - dense(started, site, rank)) / math.sqrt(1 + age)
            for each, age in zip(trained, ages, strict=True)
        )
        expected = dense(current, site) + moved / len(ages)
        assert dense(after, site) == pytest.approx(expected, rel=1e-4, abs=1e-4)


@given(RANKS, st.lists(st.integers(0, 9), min_size=1, max_size=3))
def test_rebase_factors_adds_scaled_changes(rank, ages):
    current, started = adapter(rank, 1), adapter(rank, 2)
    trained = [adapter(rank, 3 + index) for index in range(len(ages))]
    rebased = [
        rebase_factors(current, started, each, staleness_weight(age)) for each, age in zip(trained, ages, strict=True)
    ]
    after = FedIT().aggregate(current, [(each, 1.0) for each in rebased], round=1).adapter
    for site in SITES:
        for part in (0, 1):
            moved = sum(
                (each[site][part].double() - started[site][part].double()) / (1 + age) ** 0.5
                for each, age in zip(trained, ages, strict=True)
            )
            expected = current[site][part].double() + moved / len(ages)
            assert after[site][part].double() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("rebase", [rebase_product, rebase_factors])
def test_fresh_update_is_unchanged(rebase):
    current, trained = adapter(3, 1), adapter(3, 2)
    for site in SITES:
        result = dense(rebase(current, current, trained, staleness_weight(0)), site)
        assert result == pytest.approx(dense(trained, site), abs=1e-5)
    partial = {"x": trained["x"]}
    assert rebase(current, current, partial, 1.0).keys() == {"x"}  # untrained sites are left out


def test_plan_numbers_are_ordered_and_encode_the_round():
    numbers = [plan_number(version, index) for version in (1, 2) for index in (0, 1, PLANS_PER_ROUND - 1)]
    assert numbers == sorted(set(numbers))
    assert [number // PLANS_PER_ROUND for number in numbers] == [1, 1, 1, 2, 2, 2]
    with pytest.raises(ValueError, match="index"):
        plan_number(1, PLANS_PER_ROUND)


def test_ledger_charges_each_update_of_a_round(tmp_path):
    """A sealed reply answers only its own number, and both numbers are charged."""
    cache_epsilon(2)
    device, replies = make_device(tmp_path), []
    for index in (0, 1):
        replies.append(
            run_handlers({"d": handle(train_request(number=plan_number(1, index)), device)}, Performer())["d"]
        )
    charged = [entry.reservation.round for entry in device.store.ledger.entries()]
    assert charged == [plan_number(1, 0), plan_number(1, 1)]
    assert replies[1].events > replies[0].events
    assert replies[1].epsilon > replies[0].epsilon
    assert replies[1].adapter != replies[0].adapter
    again = run_handlers({"d": handle(train_request(number=plan_number(1, 1)), device)}, Performer())["d"]
    assert (again.adapter, again.events) == (replies[1].adapter, replies[1].events)


@pytest.mark.parametrize("median", [False, True])
def test_strongest_directions_stay_first(median):
    """The first two directions are the strongest, for any staleness and with entrywise rules."""
    rule, current = Exact(rank=8, max_rank=8, seed=0), adapter(8, 1)
    robust = RobustAggregation(rule, rules=[], entrywise=Median() if median else None, rank=8, seed=0)
    generator = torch.Generator().manual_seed(0)
    for number in range(4):
        updates_with_rank = [
            (
                {
                    n: Factors(*(f + 0.05 * torch.randn(f.shape, generator=generator) for f in (a[:r], b[:, :r])))
                    for n, (a, b) in current.items()
                },
                r,
            )
            for r in (2, 2, 4, 4, 8)
        ]
        updates = [(rebase_product(current, current, each, 0.7), 1.0) for each, _ in updates_with_rank]
        current = robust.with_ranks({r for _, r in updates_with_rank}).aggregate(current, updates, round=number).adapter
        for site in SITES:
            product, leading = dense(current, site), dense(current, site, 2)
            best = torch.linalg.svdvals(product)[:2].square().sum()
            assert float(leading.square().sum()) == pytest.approx(float(best), rel=1e-3)
