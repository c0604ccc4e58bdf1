"""A setting does something, or is refused."""

import dataclasses
from pathlib import Path

import pytest

from common.errors import AntherError
from conf.compose import compose
from strategies.aggregation.build import aggregation
from strategies.build import build
from strategies.planning.full_plan import training_plan
from strategies.unused_settings import refuse_ignored
from tests.helpers.fleet import SITES

CONF = Path(__file__).parents[2] / "conf"

IGNORED = {
    "strategy.outliers=0.4": "'strategy.robust=[krum]'",
    "strategy.norm_factor=0.5": "'strategy.robust=[norm]'",
    "strategy.norm_factor=0.5 'strategy.robust=[norm]' strategy.norm_bound=3": "strategy.norm_bound=null",
    "strategy.momentum=0.5": "strategy.optimiser=fedavgm",
    "strategy.second_moment=0.5 strategy.optimiser=fedavgm": "strategy.optimiser=fedadam",
    "strategy.tau=0.1 strategy.optimiser=fedavgm": "strategy.optimiser=fedyogi",
    "strategy.buffer=3": "strategy.timing=async",
    "fleet.concurrency=3": "strategy.timing=async",
    "fleet.sample=3 selection.more=5 selection=oort": "selection=thrifty",
    "fleet.sample=3 selection.weight=0.0 selection=round_robin": "selection=energy",
    "fleet.sample=3 selection.oort.alpha=1": "selection=oort",
    "fleet.workload.memory=9": "strategy.planning=device",
}
"""What nobody reads, and with what somebody does."""


@pytest.mark.parametrize("given", IGNORED)
def test_what_nobody_reads_is_refused_in_one_line(given):
    key = next(word for word in given.split() if not word.startswith(("fleet.sample", "'"))).partition("=")[0]
    config = compose(f"strategy=fedit {given}")
    plan = training_plan(config, run="r", base="b")
    with pytest.raises(AntherError, match=rf"^{key.removesuffix('.memory').removesuffix('.alpha')}[^\n]*: is only for"):
        build(config, plan, SITES, accept_simulated=True)
    refuse_ignored(compose(f"strategy=fedit {given} {IGNORED[given]}"))


@pytest.mark.parametrize("group", ["strategy", "fleet", "selection", "privacy", "preset"])
def test_nothing_that_is_shipped_trips_it(group):
    for file in sorted((CONF / group).glob("*.yaml")):
        beside = "fleet.sample=2" if group == "selection" else ""
        refuse_ignored(compose(f"{group}={file.stem} {beside}"))


def test_what_is_not_given_is_what_its_comment_says():
    """Unset they do as they did: the defaults are null, so that whoever sets one can be told."""
    strategy = compose("strategy=fedit").strategy
    unset = ("outliers", "norm_factor", "momentum", "second_moment", "tau", "buffer")
    assert [getattr(strategy, name) for name in unset] == [None] * len(unset)
    rule = aggregation(compose("strategy=fedit 'strategy.robust=[krum]'"))
    same = aggregation(compose("strategy=fedit 'strategy.robust=[krum]' strategy.outliers=0.2"))
    assert [vars(one) for one in rule._rules] == [vars(one) for one in same._rules]
    assert dataclasses.asdict(strategy)["outliers"] is None


@pytest.mark.parametrize("last", ["median", "trimmed"])
def test_slices_of_one_update_made_of_all_mean_nothing(last):
    with pytest.raises(AntherError, match=rf"strategy\.weights=rank_slice: {last} makes one update of all"):
        aggregation(compose(f"strategy=exact strategy.weights=rank_slice 'strategy.robust=[{last}]'"))
