"""Properties of all aggregation rules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.lora.adapter import split_rank
from strategies.aggregation import declared_linearity
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
from tests.helpers.means import SITES, best, close, dense, random_adapter, restricted_to, rounds, true_mean

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


def updates_of(updates, site):
    """Return the updates that trained at least one direction of a site, with their weights."""
    return [(adapter, weight) for adapter, weight in updates if site in adapter and len(adapter[site].a)]


def test_every_registered_rule_is_tested():
    assert RULES.keys() == AGGREGATIONS.keys()


@rules
def test_empty_rounds_and_invalid_weights_are_refused(rule):
    with pytest.raises(ValueError, match="no updates to aggregate"):
        rule.aggregate(random_adapter(4, 0), [], round=1)
    for weight in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="must be over 0"):
            rule.aggregate(random_adapter(4, 0), [(random_adapter(4, 1), 1.0), (random_adapter(4, 2), weight)], round=1)


@pytest.mark.integration
@rules
@given(st.data())
def test_untrained_sites_stay_and_order_does_not_matter(rule, data):
    current, updates = data.draw(rounds() if rule.mixed_ranks else rounds(ranks=(4, 4)))
    updates = restricted_to(current, updates, rule.trains(1))
    result = rule.aggregate(current, updates, round=1).adapter
    other = rule.aggregate(current, data.draw(st.permutations(updates)), round=1).adapter
    for site in SITES:
        assert close(dense(other, site), dense(result, site))
        if not updates_of(updates, site):
            assert close(dense(result, site), dense(current, site))


@rules
def test_scale_of_the_weights_does_not_matter(rule):
    current, updates = random_adapter(4, 0), [(random_adapter(4, 1), 1.0), (random_adapter(4, 2), 3.0)]
    first = rule.aggregate(current, updates, round=1).adapter
    second = rule.aggregate(current, [(adapter, 100 * weight) for adapter, weight in updates], round=1).adapter
    assert all(close(dense(second, site), dense(first, site)) for site in SITES)


def test_untrained_directions_can_still_learn():
    """HetLoRA pads missing directions of devices with zeros."""
    current = random_adapter(4, 0)
    result = RULES["hetlora"].aggregate(current, [(random_adapter(2, 1), 1.0), (random_adapter(2, 2), 1.0)], round=1)
    for site, factors in result.adapter.items():
        assert torch.equal(factors.a[2:], current[site].a[2:])
        assert torch.equal(factors.b[:, 2:], current[site].b[:, 2:])


@rules
@pytest.mark.parametrize("count", [1, 3])
def test_single_device_gets_its_product_back(rule, count):
    current = random_adapter(4, 0)
    for number in range(1, 1 + count):
        update, _ = split_rank(current, 4)
        update = {site: type(f)(f.a + 0.1, f.b - 0.1) for site, f in update.items()}
        ((update, _),) = restricted_to(current, [(update, 2.0)], rule.trains(number))
        expected = {site: true_mean(current, [(update, 2.0)], site) for site in SITES}
        result = rule.aggregate(current, [(update, 2.0)], round=number)
        assert all(close(dense(result.adapter, site), expected[site]) for site in SITES)
        assert result.diagnostics.get("residual", 0.0) < 1e-6
        current = result.adapter


@rules
def test_next_round_can_train_the_result(rule):
    """One rank at every site, float32, and a gradient in each of the first directions."""
    zero = {site: type(f)(f.a, torch.zeros_like(f.b)) for site, f in random_adapter(4, 0).items()}
    result = rule.aggregate(zero, [(zero, 1.0), (split_rank(zero, 4)[0], 1.0)], round=1).adapter
    assert len({len(f.a) for f in result.values()}) == 1
    for site in SITES:
        a, b = result[site]
        assert a.dtype == b.dtype == torch.float32
        assert (a[:4].norm(dim=1) > 0.1).all()
        assert not b.any()


@given(rounds())
def test_flora_stacks_the_mean_after_fresh_directions(round):
    current, updates = round
    result = RULES["flora"].aggregate(current, updates, round=1).adapter
    for site in SITES:
        assert close(dense(result, site), true_mean(current, updates, site))
        assert not result[site].b[:, :4].any()
        assert len(result[site].a) <= 4 + max(min(shape) for shape in SITES.values())
        assert (result[site].a[:4].norm(dim=1) > 0.1).all()


@given(rounds())
def test_flexlora_truncates_the_mean_of_sent_products(round):
    current, updates = round
    result = RULES["flexlora"].aggregate(current, updates, round=1)
    for site in SITES:
        trained = updates_of(updates, site)
        if trained:
            total = sum(weight for _, weight in trained)
            mean = sum(weight / total * dense(adapter, site) for adapter, weight in trained)
            assert close(dense(result.adapter, site), best(mean, 4))
            assert len(result.adapter[site].a) == 4


@given(rounds())
def test_raflora_averages_directions_over_their_devices(round):
    current, updates = round
    result = RULES["raflora"].aggregate(current, updates, round=1).adapter
    for site in SITES:
        trained = [(adapter[site], weight) for adapter, weight in updates_of(updates, site)]
        if not trained:
            continue
        expected = 0.0
        for j in range(4):
            owners = [(f, weight) for f, weight in trained if len(f.a) > j] or [(current[site], 1.0)]
            total = sum(weight for _, weight in owners)
            for f, weight in owners:
                expected = expected + weight / total * torch.outer(f.b[:, j].double(), f.a[j].double()).numpy()
        assert close(dense(result, site), best(expected, 4))


def test_raflora_prevents_rank_collapse():
    """One of four devices trains all four directions in every round, without changing anything."""
    adapters = dict.fromkeys(("flexlora", "raflora"), random_adapter(4, 0))
    strength = {}
    for name, current in adapters.items():
        for number in range(1, 9):
            low, high = split_rank(current, 2)[0], current
            current = RULES[name].aggregate(current, [(low, 1.0)] * 3 + [(high, 1.0)], round=number).adapter
        strength[name] = np.linalg.svd(dense(current, "x"), compute_uv=False)[3]
    full = np.linalg.svd(dense(adapters["raflora"], "x"), compute_uv=False)[3]
    assert strength["raflora"] == pytest.approx(full, rel=1e-4)
    assert strength["flexlora"] < 1e-3 * full


@given(rounds())
def test_hetlora_weights_factors_by_product_norm(round):
    current, updates = round
    result = RULES["hetlora"].aggregate(current, updates, round=1).adapter
    for site in SITES:
        trained = updates_of(updates, site)
        if not trained:
            continue
        weights = [weight * torch.linalg.norm(torch.from_numpy(dense(adapter, site))) for adapter, weight in trained]
        wanted_a, wanted_b = (torch.zeros_like(part).double() for part in current[site])
        for (adapter, _), weight in zip(trained, weights, strict=True):
            size = len(adapter[site].a)
            wanted_a[:size] += weight / sum(weights) * adapter[site].a
            wanted_b[:, :size] += weight / sum(weights) * adapter[site].b
        largest = max(len(adapter[site].a) for adapter, _ in trained)  # directions beyond it are unchanged
        wanted_a[largest:], wanted_b[:, largest:] = current[site].a[largest:], current[site].b[:, largest:]
        assert torch.allclose(result[site].a.double(), wanted_a, atol=1e-5)
        assert torch.allclose(result[site].b.double(), wanted_b, atol=1e-5)


def test_undeclared_rule_runs_without_privacy_only():
    class UndeclaredMean:
        mixed_ranks, stable_factors = False, True

    declared = declared_linearity(UndeclaredMean())
    assert not declared.linear
    assert declared.rotation_reason is not None  # so that no server optimizer or residual relies on its directions
    UndeclaredMean.sensitivity = None
    assert declared_linearity(UndeclaredMean()) is declared
    assert declared_linearity(FedIT()) is FedIT.sensitivity
