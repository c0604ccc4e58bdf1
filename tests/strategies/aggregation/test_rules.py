"""What all rules have in common."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.lora.adapter import split_rank
from strategies.aggregation.exact import Exact
from strategies.aggregation.fedit import FedIT
from strategies.aggregation.fedsa import FedSA
from strategies.aggregation.fedsb import FedSB
from strategies.aggregation.fedsvd import FedSVD
from strategies.aggregation.ffa import FFA
from strategies.aggregation.flexlora import FlexLoRA
from strategies.aggregation.flora import FLoRA
from strategies.aggregation.hetlora import HetLoRA
from strategies.aggregation.raflora import RaFLoRA
from strategies.aggregation.rolora import RoLoRA
from strategies.registry import AGGREGATIONS
from tests.helpers.means import SITES, best, close, dense, in_reach, random_adapter, rounds, true_mean

RULES = {
    "exact": Exact(rank=4, max_rank=None, seed=0),
    "fedit": FedIT(),
    "fedsa": FedSA(),
    "fedsb": FedSB(),
    "fedsvd": FedSVD(seed=0),
    "ffa": FFA(),
    "flexlora": FlexLoRA(rank=4, seed=0),
    "flora": FLoRA(rank=4, seed=0),
    "hetlora": HetLoRA(),
    "raflora": RaFLoRA(rank=4, seed=0),
    "rolora": RoLoRA(),
}
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def who_trained(updates, site):
    """Those who trained a site, one direction or more, with their weights."""
    return [(adapter, weight) for adapter, weight in updates if site in adapter and len(adapter[site].a)]


def test_they_are_all_here():
    assert RULES.keys() == AGGREGATIONS.keys()


@rules
def test_nothing_and_nobody_are_refused(rule):
    with pytest.raises(ValueError, match="nothing to aggregate"):
        rule.aggregate(random_adapter(4, 0), [], round=1)
    for weight in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="must be over 0"):
            rule.aggregate(random_adapter(4, 0), [(random_adapter(4, 1), 1.0), (random_adapter(4, 2), weight)], round=1)


@rules
@settings(max_examples=20, deadline=None)
@given(st.data())
def test_what_nobody_trained_stays_and_the_order_of_devices_is_nothing(rule, data):
    current, updates = data.draw(rounds() if rule.mixed_ranks else rounds(ranks=(4, 4)))
    updates = in_reach(current, updates, rule.trains(1))
    found = rule.aggregate(current, updates, round=1).adapter
    other = rule.aggregate(current, data.draw(st.permutations(updates)), round=1).adapter
    for site in SITES:
        assert close(dense(other, site), dense(found, site))
        if not who_trained(updates, site):
            assert close(dense(found, site), dense(current, site))


@rules
def test_the_scale_of_the_weights_is_nothing(rule):
    current, updates = random_adapter(4, 0), [(random_adapter(4, 1), 1.0), (random_adapter(4, 2), 3.0)]
    one = rule.aggregate(current, updates, round=1).adapter
    two = rule.aggregate(current, [(adapter, 100 * weight) for adapter, weight in updates], round=1).adapter
    assert all(close(dense(two, site), dense(one, site)) for site in SITES)


def test_directions_that_nobody_trained_can_still_learn():
    """Under HetLoRA, which fills what devices lack with zeros."""
    current = random_adapter(4, 0)
    found = RULES["hetlora"].aggregate(current, [(random_adapter(2, 1), 1.0), (random_adapter(2, 2), 1.0)], round=1)
    for site, factors in found.adapter.items():
        assert torch.equal(factors.a[2:], current[site].a[2:])
        assert torch.equal(factors.b[:, 2:], current[site].b[:, 2:])


@rules
@pytest.mark.parametrize("rounds_", [1, 3])
def test_one_device_that_trains_everything_gets_its_product_back(rule, rounds_):
    current = random_adapter(4, 0)
    for number in range(1, 1 + rounds_):
        trained, _ = split_rank(current, 4)
        trained = {site: type(f)(f.a + 0.1, f.b - 0.1) for site, f in trained.items()}
        ((trained, _),) = in_reach(current, [(trained, 2.0)], rule.trains(number))
        wanted = {site: true_mean(current, [(trained, 2.0)], site) for site in SITES}
        found = rule.aggregate(current, [(trained, 2.0)], round=number)
        assert all(close(dense(found.adapter, site), wanted[site]) for site in SITES)
        assert found.diagnostics.get("residual", 0.0) < 1e-6
        current = found.adapter


@rules
def test_the_next_round_can_train_what_comes_out(rule):
    """One rank at every site, of float32, with a gradient in each of the first directions."""
    zero = {site: type(f)(f.a, torch.zeros_like(f.b)) for site, f in random_adapter(4, 0).items()}
    found = rule.aggregate(zero, [(zero, 1.0), (split_rank(zero, 4)[0], 1.0)], round=1).adapter
    assert len({len(f.a) for f in found.values()}) == 1
    for site in SITES:
        a, b = found[site]
        assert a.dtype == b.dtype == torch.float32
        assert (a[:4].norm(dim=1) > 0.1).all()
        assert not b.any()


@settings(max_examples=40, deadline=None)
@given(rounds())
def test_flora_is_the_mean_of_products_behind_fresh_directions(round):
    current, updates = round
    found = RULES["flora"].aggregate(current, updates, round=1).adapter
    for site in SITES:
        assert close(dense(found, site), true_mean(current, updates, site))
        assert not found[site].b[:, :4].any()
        assert len(found[site].a) <= 4 + max(min(shape) for shape in SITES.values())
        assert (found[site].a[:4].norm(dim=1) > 0.1).all()


@settings(max_examples=40, deadline=None)
@given(rounds())
def test_flexlora_is_the_best_of_the_mean_of_what_was_sent(round):
    current, updates = round
    found = RULES["flexlora"].aggregate(current, updates, round=1)
    for site in SITES:
        there = who_trained(updates, site)
        if there:
            total = sum(weight for _, weight in there)
            mean = sum(weight / total * dense(adapter, site) for adapter, weight in there)
            assert close(dense(found.adapter, site), best(mean, 4))
            assert len(found.adapter[site].a) == 4


@settings(max_examples=40, deadline=None)
@given(rounds())
def test_raflora_averages_each_direction_over_those_who_trained_it(round):
    current, updates = round
    found = RULES["raflora"].aggregate(current, updates, round=1).adapter
    for site in SITES:
        there = [(adapter[site], weight) for adapter, weight in who_trained(updates, site)]
        if not there:
            continue
        wanted = 0.0
        for j in range(4):
            owners = [(f, weight) for f, weight in there if len(f.a) > j] or [(current[site], 1.0)]
            total = sum(weight for _, weight in owners)
            for f, weight in owners:
                wanted = wanted + weight / total * torch.outer(f.b[:, j].double(), f.a[j].double()).numpy()
        assert close(dense(found, site), best(wanted, 4))


def test_rank_does_not_collapse_under_raflora():
    """One of four devices trains all of four directions, round after round, without moving anything."""
    adapters = dict.fromkeys(("flexlora", "raflora"), random_adapter(4, 0))
    strength = {}
    for name, current in adapters.items():
        for number in range(1, 9):
            low, high = split_rank(current, 2)[0], current
            current = RULES[name].aggregate(current, [(low, 1.0)] * 3 + [(high, 1.0)], round=number).adapter
        strength[name] = np.linalg.svd(dense(current, "x"), compute_uv=False)[3]
    whole = np.linalg.svd(dense(adapters["raflora"], "x"), compute_uv=False)[3]
    assert strength["raflora"] == pytest.approx(whole, rel=1e-4)
    assert strength["flexlora"] < 1e-3 * whole


@settings(max_examples=40, deadline=None)
@given(rounds())
def test_hetlora_weighs_padded_factors_by_the_norm_of_their_product(round):
    current, updates = round
    found = RULES["hetlora"].aggregate(current, updates, round=1).adapter
    for site in SITES:
        there = who_trained(updates, site)
        if not there:
            continue
        weights = [weight * torch.linalg.norm(torch.from_numpy(dense(adapter, site))) for adapter, weight in there]
        wanted_a, wanted_b = (torch.zeros_like(part).double() for part in current[site])
        for (adapter, _), weight in zip(there, weights, strict=True):
            size = len(adapter[site].a)
            wanted_a[:size] += weight / sum(weights) * adapter[site].a
            wanted_b[:, :size] += weight / sum(weights) * adapter[site].b
        most = max(len(adapter[site].a) for adapter, _ in there)  # beyond it all stays
        wanted_a[most:], wanted_b[:, most:] = current[site].a[most:], current[site].b[:, most:]
        assert torch.allclose(found[site].a.double(), wanted_a, atol=1e-5)
        assert torch.allclose(found[site].b.double(), wanted_b, atol=1e-5)
