"""A setting does something, or is refused."""

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
    "fleet.workload.memory_factor=9": "planning.name=device",
}
"""What nobody reads, and with what somebody does."""


@pytest.mark.parametrize("given", IGNORED)
def test_what_nobody_reads_is_refused_in_one_line(given):
    key = next(word for word in given.split() if not word.startswith(("cohort.size", "'"))).partition("=")[0]
    config = compose(f"aggregation=fedit {given}")
    plan = training_plan(config, run="r", base="b")
    with pytest.raises(
        AntherError, match=rf"^{key.removesuffix('.memory_factor').removesuffix('.alpha')}[^\n]*: is only for"
    ):
        build(config, plan, SITES, accept_simulated=True)
    refuse_ignored(compose(f"aggregation=fedit {given} {IGNORED[given]}"))


@pytest.mark.parametrize("group", ["aggregation", "fleet", "selection", "privacy", "preset"])
def test_nothing_that_is_shipped_trips_it(group):
    for file in sorted((CONF / group).glob("*.yaml")):
        beside = "cohort.size=2" if group == "selection" else ""
        refuse_ignored(compose(f"{group}={file.stem} {beside}"))


def test_what_is_not_given_is_what_its_comment_says():
    """Unset they do as they did: the defaults are null, so that whoever sets one can be told."""
    config = compose("aggregation=fedit")
    optimizer = config.server_optimizer
    assert (config.robust.outlier_fraction, config.robust.norm_factor, config.round_loop.buffer_size) == (None,) * 3
    assert (optimizer.momentum, optimizer.beta2, optimizer.tau) == (None,) * 3
    rule = aggregation(compose("aggregation=fedit 'robust.rules=[krum]'"))
    same = aggregation(compose("aggregation=fedit 'robust.rules=[krum]' robust.outlier_fraction=0.2"))
    assert [vars(one) for one in rule._rules] == [vars(one) for one in same._rules]


@pytest.mark.parametrize("last", ["median", "trimmed_mean"])
def test_slices_of_one_update_made_of_all_mean_nothing(last):
    with pytest.raises(AntherError, match=rf"aggregation\.weighting=rank_slice: {last} makes one update of all"):
        aggregation(compose(f"aggregation=exact aggregation.weighting=rank_slice 'robust.rules=[{last}]'"))
