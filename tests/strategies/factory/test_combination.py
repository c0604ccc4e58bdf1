"""Configurations are checked before a base is loaded, as the strategy that is built from them."""

from dataclasses import replace

import pytest

from common.errors import AntherError
from conf.components import ComponentConfig
from conf.groups import choices
from conf.schemas.rounds import PlanningConfig
from privacy.storage import FileStorage
from server.ledger import ServerLedger
from strategies.factory.combination import check_configuration, combination
from strategies.factory.full_plan import training_plan
from strategies.factory.strategy import build
from tests.helpers.configs import compose
from tests.helpers.fleet import SITES, bases_file

KNOWN = {
    "aggregation": ", ".join(choices("aggregation")),
    "robust": "afa, foolsgold, geometric_median, krum, median, norm_bound, replay, trimmed_mean",
    "selection": "deadline, eafl, energy_delay, everyone, oort, poisson, power_of_choice, random, round_robin",
    "server_optimizer": "fedadam, fedavgm, fedyogi, none",
    "planning": "device, full",
}


@pytest.mark.parametrize("key", KNOWN)
def test_unknown_name_lists_the_known_ones(key):
    """A user's own YAML file may have any name."""
    named = {"robust": {"lion": {}}, "planning": PlanningConfig(name="lion")}.get(key, ComponentConfig("lion"))
    with pytest.raises(AntherError) as caught:
        check_configuration(replace(compose(""), **{key: named}))
    assert str(caught.value) == f"{key}=lion: nothing is registered under this name; known are {KNOWN[key]}"


@pytest.mark.parametrize(("name", "key"), [("everyone", "cohort.size=null"), ("poisson", "cohort.sampling_rate")])
def test_selections_of_another_key(name, key):
    with pytest.raises(AntherError, match=f"^selection={name}: set {key} instead"):
        check_configuration(replace(compose("cohort.size=2"), selection=ComponentConfig(name)))


SHARED = (
    "trained_parts",
    "level",
    "local_optimizer",
    "scaffold",
    "keep",
    "feedback",
    "download",
    "lora_xs_bases",
    "every_site",
    "limits",
    "quorum",
    "local_noise",
    "central_noise",
)


@pytest.mark.integration
@pytest.mark.parametrize(
    "overrides",
    [
        "",
        "aggregation=fedit 'robust=[replay,krum,median]' round_loop.quorum=2 compression.download=int8",
        "aggregation=fedit drift_correction=scaffold adapter.shared.optimizer=sgd",
        "aggregation=fedit 'robust=[median]' compression.metered_upload=int4",
        "aggregation=ffa compression.upload=int4 compression.keep_fraction=0.5 planning.metered_rank=2",
        "aggregation=fedsb adapter.lora_xs_bases=BASES adapter.shared.rank=3",
        "aggregation=fedit privacy=device cohort.sampling_rate=0.5 private_eval.interval=2 planning.max_joules=7",
        "aggregation=fedit privacy=example private_eval.interval=2 compression.metered_upload=int4",
    ],
)
def test_built_strategy_has_the_combination_of_its_configuration(overrides, tmp_path):
    config = compose(overrides.replace("BASES", str(bases_file(tmp_path))) + " rounds=2 adapter.shared.steps=1")
    plan = training_plan(config, run="r", base="b")
    ledger = ServerLedger(FileStorage(tmp_path))
    built = build(config, plan, SITES, accept_simulated=True, ledger=ledger).combination
    expected = combination(config)
    for name in SHARED:
        if name not in ("local_noise", "central_noise") or config.private_eval.interval:
            assert getattr(built, name) == getattr(expected, name), name
    for axis in ("aggregation", "selection", "optimizer"):
        assert getattr(built, axis).name == getattr(expected, axis).name
    assert [rule.name for rule in built.robust] == [rule.name for rule in expected.robust]
