"""A string of overrides composes, or is refused in one line."""

from pathlib import Path

import pytest

from common.errors import AntherError
from conf.compose import compose
from tests.helpers import configs

CONF = Path(compose.__code__.co_filename).parent
OPTIONS = [(file.parent.name, file.stem) for file in CONF.glob("*/*.yaml")]
REQUIRING = ("data", "device")  # groups whose options need other keys, or that a simulation lacks


@pytest.mark.integration
def test_overrides_are_parsed_as_by_a_shell():
    config = compose("rounds=3 privacy=example 'data.pictures=[my photos,other]'")
    assert (config.rounds, config.privacy.level, config.data.pictures) == (3, "example", ["my photos", "other"])
    assert compose("").rounds == compose("  ").rounds


@pytest.mark.integration
def test_configurations_share_nothing():
    first = compose("")
    first.data.pictures.append("changed")
    first.fleet.profiles.clear()
    second = compose("")
    assert second.data.pictures == []
    assert second.fleet.profiles


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("rouns=2", "did you mean rounds"),
        ("privacy=none privacy.level=x", "must be one of"),
        ("rounds=0", "must be 1 or more"),
        ("it's", "No closing quotation"),
        ("privacy=null", "privacy|group"),
    ],
)
def test_mistakes_are_one_line(overrides, message):
    with pytest.raises(AntherError, match=message) as caught:
        compose(overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.integration
@pytest.mark.parametrize(
    "overrides",
    [
        "",
        "aggregation=fedit privacy=device privacy.epsilon=4 data.writers=100 cohort.sampling_rate=0.1",
        "cohort.size=3 selection.alpha=1 selection=oort robust=[afa,krum] robust.krum.outlier_fraction=1e-1",
        "preset=private 'robust=[krum,median]' resume=true base.path=2024_01x",
        "fleet=pis planning.deadline=9 planning.max_joules=null adapter.shared.lr=1e-3",
        "personalization=prior personalization.weight=0.5 compression=int8 round_loop=async fleet=week robust=[]",
        *(
            pytest.param(f"{group}={name}", marks=pytest.mark.stress)
            for group, name in OPTIONS
            if group not in REQUIRING
        ),
    ],
)
def test_helper_of_other_tests_composes_equally(overrides):
    expected = compose(overrides)
    for _ in range(2):  # also a second time
        composed = configs.compose(overrides)
        assert composed == expected
        assert repr(composed) == repr(expected)  # also the order of options and rules
