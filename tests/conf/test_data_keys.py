"""Keys of one kind of data are refused with another."""

from __future__ import annotations

import pytest

from common.errors import AntherError
from conf.compose import compose
from conf.data_keys import refuse_other_data
from tests.helpers import configs

PEOPLE = "data=people data.path=people.parquet"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"{PEOPLE} data.writers=4", "data.writers=4: only used by data=typefaces and data=folder; set data.people"),
        (f"data.role=test {PEOPLE}", "data.role=test: only used by data=typefaces and data=folder; set data.roles"),
        ("data.path=people.parquet data.writers=4", "data.writers=4: only used by data=typefaces"),
    ],
)
def test_key_of_writers_is_refused(words: str, message: str) -> None:
    with pytest.raises(AntherError, match=message):
        refuse_other_data(words.split())


def test_own_keys_are_accepted() -> None:
    for words in (f"{PEOPLE} data.people=4 data.roles=[test]", "data.writers=3", "data.path=null data.writers=3"):
        refuse_other_data(words.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("data.people=3", r"data\.people=3: requires data\.path"),
        ("data.roles=[test]", r"data\.roles=\['test'\]: requires data\.path"),
        ("data.newcomers=[ann]", r"data\.newcomers=\['ann'\]: requires data\.path"),
        ("data.person=writer", r"data\.person=writer: requires data\.path"),
        ("data.path=x data.pictures=[photos]", r"data\.pictures: only used without data\.path"),
        ("data.path=x data.devices=30", r"data\.devices=30: only used without data\.path; leave it out, or set data\."),
        ("data.path=x data.label_skew=true", r"data\.label_skew=True: only used without data\.path"),
        ("data.path=x data.people=0", r"data\.people=0: must be 1 or more, or null for all"),
        ("data.path=x data.train=0", r"data\.train=0: must be 1 or more"),
        ("data.path=x data.person=''", r"data\.person: must name a column"),
        ("""data.path='""'""", r"data\.path: needs a value; name a Parquet file or a folder"),
        ("data.path=x data.people=3 cohort.size=4", r"cohort\.size=4: there are only 3 devices"),
        ("data.path=x data.people=3 evaluation.devices=4", r"evaluation\.devices=4: there are only 3 devices"),
    ],
)
def test_schema_refuses_other_keys(words: str, message: str) -> None:
    with pytest.raises(AntherError, match=message):
        configs.compose(words)


def test_limits_are_those_of_typefaces_only() -> None:
    data = configs.compose("data.path=x data.train=100 data.validation=50 data.test=200 data.people=3").data
    assert (data.train, data.known_count(), data.owner_count()) == (100, 3, 3)
    assert configs.compose("data.path=x cohort.size=500").data.known_count() is None


@pytest.mark.integration
def test_preset_applies_to_people() -> None:
    """It also sets the number of writers, which people don't use."""
    config = compose([*PEOPLE.split(), "data.people=6", "preset=quick"])
    assert (config.data.count(), config.data.test, config.rounds) == (6, 6, 2)
    with pytest.raises(AntherError, match=r"^data\.path: needs a value"):
        compose("data=people")
    with pytest.raises(AntherError, match=r"^data\.writers=4: only used by"):
        compose(f"{PEOPLE} data.writers=4")
