"""From configuration to strategy."""

import pytest

from conf.compose import compose
from conf.errors import AntherError
from privacy.accounting import PoissonGaussian, epsilon
from strategies.aggregation.exact import Exact
from strategies.aggregation.fedit import FedIT
from strategies.build import aggregation, build, training_plan
from tests.fleet import SITES


def test_the_aggregation_is_the_one_named():
    assert isinstance(aggregation(compose("strategy=exact")), Exact)
    assert isinstance(aggregation(compose("strategy=fedit")), FedIT)
    assert isinstance(aggregation(compose("strategy=fedit strategy.max_rank=8 adapter.shared.rank=8")), FedIT)


@pytest.mark.parametrize("strategy", ["exact", "fedit"])
def test_every_shipped_strategy_builds(strategy):
    config = compose(f"strategy={strategy} fleet.sample=2")
    build(config, training_plan(config, run="r", base="b"), SITES, accept_simulated=False).summary()


@pytest.mark.parametrize("strategy", ["exact", "fedit"])
def test_a_cap_below_the_rank_is_refused(strategy):
    with pytest.raises(AntherError, match=r"strategy\.max_rank=2: .*adapter\.shared\.rank=8"):
        aggregation(compose(f"strategy={strategy} strategy.max_rank=2 adapter.shared.rank=8"))


@pytest.mark.parametrize(("overrides", "trained", "measured"), [
    ("", 20, 20), ("fleet.sample=5", 5, 5), ("fleet.sample=5 fleet.evaluate=7", 5, 7), ("fleet.evaluate=7", 20, 7),
])  # fmt: skip
def test_how_many_are_asked(overrides, trained, measured):
    config = compose(overrides)
    found = build(config, training_plan(config, run="r", base="b"), SITES, accept_simulated=False)
    names = [str(number) for number in range(20)]
    for number in (1, 2):
        asked = [selection.select(names, round=number) for selection in (found._selection, found._evaluation)]
        assert [len(chosen) for chosen in asked] == [trained, measured]
    if trained == measured == 5:
        assert asked[0] != asked[1]  # who trains says nothing of who measures


def test_a_plan_without_privacy():
    plan = training_plan(compose("privacy=none adapter.shared.steps=7"), run="r", base="b")
    assert (plan.run, plan.base, plan.steps, plan.privacy) == ("r", "b", 7, None)


def test_noise_is_solved_for_all_rounds_together():
    config = compose("privacy=example privacy.epsilon=4 rounds=5 adapter.shared.steps=3 data.train=16")
    private = training_plan(config, run="r", base="b").privacy
    assert private.sampling_rate == config.adapter.shared.batch_size / 16
    event = PoissonGaussian(noise_multiplier=private.noise_multiplier, sampling_rate=private.sampling_rate, steps=5 * 3)
    assert 0.99 * 4 <= epsilon([event], private.delta).value <= 4


def test_more_asked_than_there_is_means_everything():
    config = compose("privacy=example adapter.shared.batch_size=8 data.train=5")
    assert training_plan(config, run="r", base="b").privacy.sampling_rate == 1.0
