"""Settings without an effect are refused."""

from pathlib import Path

import pytest

from common.errors import AntherError
from strategies.factory.aggregation import build_aggregation
from strategies.factory.combination import check_configuration
from strategies.factory.full_plan import training_plan
from strategies.factory.strategy import build
from strategies.unused_settings import refuse_unused
from tests.helpers.configs import compose
from tests.helpers.fleet import SITES

CONF = Path(__file__).parents[2] / "conf"

UNUSED = {
    "robust.outlier_fraction=0.4": "'robust.rules=[krum]'",
    "robust.norm_factor=0.5": "'robust.rules=[norm_bound]'",
    "robust.norm_factor=0.5 'robust.rules=[norm_bound]' robust.norm_bound=3": "robust.norm_bound=null",
    "server_optimizer.momentum=0.5": "server_optimizer.name=fedavgm",
    "server_optimizer.beta2=0.5 server_optimizer.name=fedavgm": "server_optimizer.name=fedadam",
    "server_optimizer.tau=0.1 server_optimizer.name=fedavgm": "server_optimizer.name=fedyogi",
    "round_loop.buffer_size=3": "round_loop.mode=async",
    "round_loop.concurrency=3": "round_loop.mode=async",
    "cohort.size=3 selection.candidate_factor=5 selection=oort": "selection=energy_delay",
    "cohort.size=3 selection.utility_weight=0.0 selection=round_robin": "selection=eafl",
    "cohort.size=3 selection.oort.alpha=1": "selection=oort",
}
"""Unused settings, and the settings with which they are used."""


@pytest.mark.integration
@pytest.mark.parametrize("given", UNUSED)
def test_unused_settings_are_refused_in_one_line(given):
    key = next(word for word in given.split() if not word.startswith(("cohort.size", "'"))).partition("=")[0]
    config = compose(f"aggregation=fedit {given}")
    plan = training_plan(config, run="r", base="b")
    with pytest.raises(AntherError, match=rf"^{key.removesuffix('.alpha')}[^\n]*: only used by"):
        build(config, plan, SITES, accept_simulated=True)
    refuse_unused(compose(f"aggregation=fedit {given} {UNUSED[given]}"))


@pytest.mark.integration
@pytest.mark.parametrize("group", ["aggregation", "fleet", "selection", "privacy", "preset"])
def test_shipped_options_use_their_settings(group):
    for file in sorted((CONF / group).glob("*.yaml")):
        size = "cohort.size=2" if group == "selection" else ""
        refuse_unused(compose(f"{group}={file.stem} {size}"))


def test_null_acts_like_the_documented_default():
    """Defaults are null, so that a given value can be detected, and act like the documented value."""
    config = compose("aggregation=fedit")
    optimizer = config.server_optimizer
    assert (config.robust.outlier_fraction, config.robust.norm_factor, config.round_loop.buffer_size) == (None,) * 3
    assert (optimizer.momentum, optimizer.beta2, optimizer.tau) == (None,) * 3
    rule = build_aggregation(compose("aggregation=fedit 'robust.rules=[krum]'"))
    explicit = build_aggregation(compose("aggregation=fedit 'robust.rules=[krum]' robust.outlier_fraction=0.2"))
    assert [vars(one) for one in rule.rules] == [vars(one) for one in explicit.rules]


@pytest.mark.parametrize("entrywise", ["median", "trimmed_mean"])
def test_entrywise_rules_exclude_rank_slices(entrywise):
    with pytest.raises(
        AntherError, match=rf"aggregation\.weighting=rank_slice: {entrywise} combines all updates into one"
    ):
        check_configuration(compose(f"aggregation=exact aggregation.weighting=rank_slice 'robust.rules=[{entrywise}]'"))
