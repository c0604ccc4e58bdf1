"""Aggregations with robust rules against dense means."""

from dataclasses import replace
from operator import add

import numpy as np
import pytest
from hypothesis import given, settings

from common.errors import AntherError
from models.lora.adapter import Factors, adapter_shapes, from_tensors, init_adapter, to_tensors
from protocol.tensor_codec import decode, encode
from server.rounds.loop import run_rounds
from simulations.grid.cohort import CohortGrid
from strategies.aggregation.exact import Exact
from strategies.aggregation.fedit import FedIT
from strategies.aggregation.flexlora import FlexLoRA
from strategies.aggregation.hetlora import HetLoRA
from strategies.factory.aggregation import build_aggregation
from strategies.factory.combination import check_configuration
from strategies.registry import ROBUST_RULES
from strategies.robust.afa import AFA
from strategies.robust.foolsgold import FoolsGold
from strategies.robust.geometric import GeometricMedian
from strategies.robust.gram import changes
from strategies.robust.krum import MultiKrum
from strategies.robust.norm import NormBound
from strategies.robust.robust_aggregation import RobustAggregation
from strategies.robust.trimmed import Median, TrimmedMean
from tests.helpers.configs import compose
from tests.helpers.fleet import SITES as FLEET_SITES
from tests.helpers.fleet import FakeDevice, fresh_state, handle, perform, strategy
from tests.helpers.means import SITES, close, dense, distance, random_adapter, rounds
from tests.strategies.robust.test_gram import change, refactored, trained


def exact():
    return Exact(rank=4, max_rank=None, seed=0)


def with_rules(rule, *rules, entrywise=None):
    return RobustAggregation(rule, rules=rules, entrywise=entrywise, rank=None, seed=0)


@given(rounds())
def test_exact_averages_the_scaled_changes(round):
    current, updates = round
    rule = NormBound(factor=0.5)
    result = with_rules(exact(), rule).aggregate(current, updates, round=1).adapter
    judged = rule.reweight(changes(current, updates))
    for site in SITES:
        active = [index for index, (adapter, _) in enumerate(updates) if trained(adapter, site)]
        moved = np.zeros_like(dense(current, site))
        if active:
            scaled = [float(judged.scales[index]) * change(current, updates[index][0], site) for index in active]
            moved = np.average(scaled, axis=0, weights=[updates[index][1] for index in active])
        assert close(dense(result, site), dense(current, site) + moved)


def test_fedit_moves_each_factor_by_the_scale():
    current, adapter = random_adapter(4, 0), random_adapter(4, 1)
    norm = float(changes(current, [(adapter, 1.0)]).norms())
    result = with_rules(FedIT(), NormBound(bound=norm / 4)).aggregate(current, [(adapter, 3.0)], round=1)
    for site in SITES:
        for new, start, sent in zip(result.adapter[site], current[site], adapter[site], strict=True):
            assert np.allclose(new, 0.75 * start + 0.25 * sent, atol=1e-6)
    assert result.diagnostics["held"] == 1
    assert result.diagnostics["left_out"] == 0


@pytest.mark.parametrize("rule", [exact(), FlexLoRA(rank=8, seed=0)], ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("size", [1.0, 1e2, 1e4])
def test_bounded_device_moves_the_mean_by_its_weight(rule, size):
    """‖ΔW' − ΔW‖ ≤ M for any update of one of five devices; not with HetLoRA, whose weights grow with the norm."""
    current = random_adapter(4, 0)
    bound = 0.5
    for index in range(5):
        updates = [(current, 1.0)] * index + [(random_adapter(4, 3, scale=size), 1.0)] + [(current, 1.0)] * (4 - index)
        result = with_rules(rule, NormBound(bound=bound)).aggregate(current, updates, round=1).adapter
        moved = sum(((dense(result, site) - dense(current, site)) ** 2).sum() for site in SITES)
        assert moved**0.5 == pytest.approx(bound / 5, rel=1e-3)
    bounded = with_rules(HetLoRA(), NormBound(bound=bound)).aggregate(current, updates, round=1).adapter
    moved = sum(((dense(bounded, site) - dense(current, site)) ** 2).sum() for site in SITES) ** 0.5
    assert size == 1 or moved > 10 * bound


AGGREGATIONS_WITH_RULES = {
    "norm_bound": with_rules(exact(), NormBound()),
    "krum": with_rules(exact(), MultiKrum(outlier_fraction=0.2)),
    "foolsgold": with_rules(exact(), FoolsGold()),
    "afa": with_rules(exact(), AFA()),
    "geometric_median": with_rules(exact(), GeometricMedian()),
    "median": with_rules(exact(), entrywise=Median()),
    "trimmed_mean": with_rules(exact(), NormBound(), entrywise=TrimmedMean(outlier_fraction=0.2)),
}


def test_every_registered_rule_is_tested():
    assert {"replay", *AGGREGATIONS_WITH_RULES} == ROBUST_RULES.keys()  # replay checks single replies


@pytest.mark.parametrize("rule", AGGREGATIONS_WITH_RULES.values(), ids=AGGREGATIONS_WITH_RULES)
@settings(max_examples=10)  # an example aggregates several times with every rule
@given(rounds())
def test_order_and_factorization_do_not_matter(rule, round):
    current, updates = round
    if rule is AGGREGATIONS_WITH_RULES["krum"]:  # equal scores are decided by order
        updates = [(random_adapter(1 + n % 4, 7 + n), weight) for n, (_, weight) in enumerate(updates)]
    first = rule.aggregate(current, updates, round=1).adapter
    other = [(refactored(adapter, number), weight) for number, (adapter, weight) in enumerate(reversed(updates))]
    second = rule.aggregate(current, other, round=1).adapter
    for site in SITES:
        assert distance(dense(second, site), dense(first, site)) < 1e-3
        if not any(trained(adapter, site) for adapter, _ in updates):
            assert close(dense(first, site), dense(current, site))


@pytest.mark.parametrize(
    "rule", [exact(), FedIT(), HetLoRA(), FlexLoRA(rank=4, seed=0)], ids=lambda r: type(r).__name__
)
def test_attacker_is_removed_before_every_aggregation(rule):
    current = random_adapter(4, 0)
    moved = [random_adapter(4, seed, scale=0.1) for seed in range(1, 7)]
    honest = [({site: Factors(*map(add, current[site], m[site])) for site in SITES}, 1.0) for m in moved]
    expected = rule.aggregate(current, honest, round=1).adapter
    attacked = [*honest[:2], (random_adapter(4, 9, scale=50.0), 1.0), *honest[2:]]
    result = with_rules(rule, MultiKrum(outlier_fraction=0.2)).aggregate(current, attacked, round=1)
    assert result.diagnostics["left_out"] == 1
    assert all(close(dense(result.adapter, site), dense(expected, site)) for site in SITES)
    single = with_rules(rule, MultiKrum(outlier_fraction=0.2), entrywise=Median()).aggregate(
        current, honest[:1], round=1
    )
    assert all(distance(dense(single.adapter, site), dense(honest[0][0], site)) < 1e-3 for site in SITES)


def test_configurations_are_built_or_refused():
    rule = build_aggregation(
        compose("aggregation=fedit 'robust=[norm_bound,geometric_median]' robust.norm_bound.factor=2")
    )
    assert isinstance(rule, RobustAggregation)
    assert rule.sensitivity.linear
    assert not build_aggregation(compose("aggregation=fedit robust=[median]")).sensitivity.linear
    with pytest.raises(AntherError, match=r"^robust: median merges all updates into one: put it last"):
        check_configuration(compose("robust=[median,krum]"))
    with pytest.raises(AntherError, match="median rotates the factors, and aggregation=fedsb"):
        check_configuration(compose("aggregation=fedsb robust=[median] adapter.lora_xs_bases=glyphs-frame"))


def test_initial_adapter():
    """B is zero, and its directions can still learn."""
    start = init_adapter(FLEET_SITES, 4, seed=0)
    for rule in AGGREGATIONS_WITH_RULES.values():
        result = rule.aggregate(start, [(start, 1.0)] * 6, round=1).adapter
        for site in FLEET_SITES:
            assert len(result[site].a) == 4
            assert not result[site].b.any()
            assert (result[site].a.norm(dim=1) > 0.1).all()


def grown(reply):
    """Send twenty times B, which passes validation."""
    sent = from_tensors(decode(reply.adapter, adapter_shapes(FLEET_SITES, reply.rank)))
    return replace(reply, adapter=encode(to_tensors({site: Factors(f.a, 20 * f.b) for site, f in sent.items()})))


def broken(reply):
    return replace(reply, adapter=b"nothing")


def test_run_ignores_an_attacker(monkeypatch, tmp_path):
    """The real loop is run with an attacker, and with a device whose replies can't be read."""
    monkeypatch.setattr("simulations.grid.cohort.handle", handle)

    def run(rule, **devices):
        fleet = [FakeDevice(name, misbehave=misbehave) for name, misbehave in devices.items()]
        state = run_rounds(
            grid=CohortGrid(fleet, perform),
            strategy=strategy(aggregation=rule),
            state=fresh_state(),
            rounds=2,
            checkpoints=tmp_path / str(len(fleet)),
            on_round=lambda _: None,
        )
        return state.adapter, [record.train for record in state.history[1:]]

    honest = dict.fromkeys("abcde")
    result, message = run(with_rules(fleet_exact(), MultiKrum(outlier_fraction=0.2)), **honest, x=grown, y=broken)
    assert [train.replied for train in message] == [6, 6]
    assert [train.diagnostics["left_out"] for train in message] == [1, 1]
    expected, _ = run(fleet_exact(), **honest)
    assert all(close(dense(result, site), dense(expected, site)) for site in FLEET_SITES)


def fleet_exact():
    return Exact(rank=3, max_rank=None, seed=0)
