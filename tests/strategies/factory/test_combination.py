"""Names of components are checked before a base is loaded."""

import pytest

from common.errors import AntherError
from conf.compose import compose
from strategies.factory.combination import check_configuration

KNOWN = {
    "aggregation.name": "exact, fedit, fedsa, fedsb, fedsvd, ffa, flexlora, flora, hetlora, raflora, rolora",
    "robust.rules": "afa, foolsgold, geometric_median, krum, median, norm_bound, replay, trimmed_mean",
    "selection.name": "deadline, eafl, energy_delay, everyone, oort, poisson, power_of_choice, random, round_robin",
    "server_optimizer.name": "fedadam, fedavgm, fedyogi, none",
    "planning.name": "device, full",
}


@pytest.mark.parametrize("key", KNOWN)
def test_unknown_name_lists_the_known_ones(key):
    value = "[lion]" if key == "robust.rules" else "lion"
    with pytest.raises(AntherError) as caught:
        check_configuration(compose(f"{key}={value}"))
    shown = key.removesuffix(".name") if key.startswith("selection") else key
    assert str(caught.value) == f"{shown}=lion: nothing is registered under this name; known are {KNOWN[key]}"


@pytest.mark.parametrize(("name", "key"), [("everyone", "cohort.size=null"), ("poisson", "cohort.sampling_rate")])
def test_selections_of_another_key(name, key):
    with pytest.raises(AntherError, match=f"^selection={name}: set {key} instead"):
        check_configuration(compose(f"selection.name={name} cohort.size=2"))
