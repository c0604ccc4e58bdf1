"""Updates of older adapters on newer ones, against dense matrices."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client.rounds.handler import handle
from client.rounds.scheduler import run_handlers
from models.lora.adapter import Adapter, Factors, init_adapter
from strategies.aggregation.exact import Exact
from strategies.aggregation.fedit import FedIT
from strategies.fedbuff import PLANS_PER_ROUND, plan_number, rebase_factors, rebase_product, staleness_weight
from strategies.robust.robust_aggregation import RobustAggregation
from strategies.robust.trimmed import Median
from tests.helpers.devices import Performer, know_epsilon, make_device, train_request
from tests.helpers.fleet import SITES


def adapter(rank: int, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: Factors(a, torch.randn(len(b), rank, generator=generator))
        for name, (a, b) in init_adapter(SITES, rank, seed).items()
    }


def dense(found: Adapter, site: str, rank: int | None = None) -> torch.Tensor:
    a, b = found[site]
    return b.double()[:, :rank] @ a.double()[:rank]


RANKS = st.integers(1, 4)


@settings(max_examples=25, deadline=None)
@given(RANKS, RANKS, RANKS, st.lists(st.integers(0, 9), min_size=1, max_size=3))
def test_products_move_by_what_was_made_of_the_older_one(now, then, rank, ages):
    """Δ = Σ s(τ) (B_k A_k − B_v A_v) / K, with the directions that a device didn't train left out of both."""
    rank = min(now, then, rank)
    current, started = adapter(now, 1), adapter(then, 2)
    trained = [adapter(rank, 3 + place) for place in range(len(ages))]
    shifted = [
        rebase_product(current, started, each, staleness_weight(age)) for each, age in zip(trained, ages, strict=True)
    ]
    after = Exact(rank=1, max_rank=None, seed=0).aggregate(current, [(each, 1.0) for each in shifted], round=1).adapter
    for site in SITES:
        moved = sum(
            (dense(each, site) - dense(started, site, rank)) / math.sqrt(1 + age)
            for each, age in zip(trained, ages, strict=True)
        )
        expected = dense(current, site) + moved / len(ages)
        assert dense(after, site) == pytest.approx(expected, rel=1e-4, abs=1e-4)


@settings(max_examples=25, deadline=None)
@given(RANKS, st.lists(st.integers(0, 9), min_size=1, max_size=3))
def test_factors_move_by_their_own_changes(rank, ages):
    current, started = adapter(rank, 1), adapter(rank, 2)
    trained = [adapter(rank, 3 + place) for place in range(len(ages))]
    shifted = [
        rebase_factors(current, started, each, staleness_weight(age)) for each, age in zip(trained, ages, strict=True)
    ]
    after = FedIT().aggregate(current, [(each, 1.0) for each in shifted], round=1).adapter
    for site in SITES:
        for part in (0, 1):
            moved = sum(
                (each[site][part].double() - started[site][part].double()) / (1 + age) ** 0.5
                for each, age in zip(trained, ages, strict=True)
            )
            expected = current[site][part].double() + moved / len(ages)
            assert after[site][part].double() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("shift", [rebase_product, rebase_factors])
def test_a_fresh_update_is_what_was_trained(shift):
    current, trained = adapter(3, 1), adapter(3, 2)
    for site in SITES:
        found = dense(shift(current, current, trained, staleness_weight(0)), site)
        assert found == pytest.approx(dense(trained, site), abs=1e-5)
    partial = {"x": trained["x"]}
    assert shift(current, current, partial, 1.0).keys() == {"x"}  # what it didn't train is not its affair


def test_numbers_are_in_order_and_say_their_round():
    numbers = [plan_number(version, place) for version in (1, 2) for place in (0, 1, PLANS_PER_ROUND - 1)]
    assert numbers == sorted(set(numbers))
    assert [number // PLANS_PER_ROUND for number in numbers] == [1, 1, 1, 2, 2, 2]
    with pytest.raises(ValueError, match="place"):
        plan_number(1, PLANS_PER_ROUND)


def test_a_ledger_charges_each_of_two_updates_in_one_round(tmp_path):
    """What is sealed for one number is never the answer to another, and both are paid for."""
    know_epsilon(2)
    device, replies = make_device(tmp_path), []
    for place in (0, 1):
        replies.append(
            run_handlers({"d": handle(train_request(number=plan_number(1, place)), device)}, Performer())["d"]
        )
    charged = [entry.reservation.round for entry in device.store.ledger.entries()]
    assert charged == [plan_number(1, 0), plan_number(1, 1)]
    assert replies[1].events > replies[0].events
    assert replies[1].epsilon > replies[0].epsilon
    assert replies[1].adapter != replies[0].adapter
    again = run_handlers({"d": handle(train_request(number=plan_number(1, 1)), device)}, Performer())["d"]
    assert (again.adapter, again.events) == (replies[1].adapter, replies[1].events)


@pytest.mark.parametrize("median", [False, True])
def test_the_strongest_directions_stay_the_first_of_stacked_factors(median):
    """Whoever trains two gets the best two, whatever age updates have, and whichever rule made one of all."""
    rule, current = Exact(rank=8, max_rank=8, seed=0), adapter(8, 1)
    guarded = RobustAggregation(rule, rules=[], entrywise=Median() if median else None, rank=8, seed=0)
    generator = torch.Generator().manual_seed(0)
    for number in range(4):
        made = [
            (
                {
                    n: Factors(*(f + 0.05 * torch.randn(f.shape, generator=generator) for f in (a[:r], b[:, :r])))
                    for n, (a, b) in current.items()
                },
                r,
            )
            for r in (2, 2, 4, 4, 8)
        ]
        updates = [(rebase_product(current, current, each, 0.7), 1.0) for each, _ in made]
        current = guarded.with_ranks({r for _, r in made}).aggregate(current, updates, round=number).adapter
        for site in SITES:
            whole, first = dense(current, site), dense(current, site, 2)
            best = torch.linalg.svdvals(whole)[:2].square().sum()
            assert float(first.square().sum()) == pytest.approx(float(best), rel=1e-3)
