"""Tests of the planned federations: members, newcomers, and files of their people."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest

from bench.quality.people_data import HandwritingPerson, read_people
from bench.quality.people_plan import (
    FederationRun,
    PeopleExperiment,
    donor_runs,
    letter_runs,
    member_runs,
    newcomer_runs,
    private_runs,
    size_runs,
)
from bench.quality.people_settings import PeopleSettings
from tests.helpers.people import characters, write
from typefaces.dataset import GLYPHS

LETTERS = {"one-1": ("test", 40), "one-2": ("test", 30), "two-1": ("test", 40), "one-3": ("extra", 26)}
LETTERS |= {"two-2": ("extra", 30), "two-3": ("development", 40), "two-4": ("test", 21)}
SETTINGS = PeopleSettings(
    federation=("personalization=directions", "base.compute_dtype=bf16", "evaluation.timesteps=2"),
    private={"p": ("x=1",)},
)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> PeopleExperiment:
    folder = tmp_path_factory.mktemp("people")
    rows = [row for name, (role, n) in LETTERS.items() for row in characters([name], GLYPHS[:n], role=role)]
    file = write(folder / "people.parquet", rows)
    return PeopleExperiment(file, read_people(file), "test", SETTINGS, folder / "runs", ("base.device=cpu",), (3, 4))


def words(run: FederationRun) -> dict[str, str]:
    """Return the effective overrides of a run."""
    return dict(word.split("=", 1) for word in run.overrides)


def people(run: FederationRun) -> set[str]:
    return set(pq.read_table(words(run)["data.path"]).column("person").to_pylist())


def names(found: list[HandwritingPerson]) -> set[str]:
    return {person.name for person in found}


def test_members_have_enough_letters(experiment: PeopleExperiment) -> None:
    assert names(experiment.members(5)) == {"one-1", "one-2", "two-1", "one-3", "two-2"}
    assert names(experiment.members(10)) == {"one-1", "one-2", "two-1", "two-2"}
    assert names(experiment.members(20)) == {"one-1", "two-1"}
    assert names(experiment.measured) == {name for name, (role, _) in LETTERS.items() if role == "test"}


def test_members_take_part_with_every_seed(experiment: PeopleExperiment) -> None:
    runs = member_runs(experiment, 5)
    assert [words(run)["seed"] for run in runs] == ["3", "4"]
    assert [people(run) for run in runs] == [names(experiment.members(5))] * 2
    assert words(runs[0])["data.evaluated_roles"] == "[test]"
    assert runs[0].overrides[-1] == "base.device=cpu"


def test_each_measured_person_is_a_newcomer_once(experiment: PeopleExperiment) -> None:
    runs = newcomer_runs(experiment, 5, 2)
    joined = [name for run in runs.values() for name in words(run)["data.newcomers"][1:-1].split(",")]
    assert sorted(joined) == ["one-1", "one-2", "two-1"]
    assert all(people(run) == names(experiment.members(5)) for run in runs.values())


def test_no_hand_of_a_left_out_donor_is_a_member(experiment: PeopleExperiment) -> None:
    runs = donor_runs(experiment, 5, fewest=1)
    joined = {donor: set(words(run)["data.newcomers"][1:-1].split(",")) for donor, run in runs.items()}
    assert joined == {"one": {"one-1", "one-2"}, "two": {"two-1"}}
    for donor, run in runs.items():
        members = people(run) - joined[donor]
        assert members
        assert all(not name.startswith(donor) for name in members)
    assert list(donor_runs(experiment, 5, fewest=2)) == ["one"]


def test_letters_are_compared_on_the_same_people(experiment: PeopleExperiment) -> None:
    runs = letter_runs(experiment, [1, 20])
    assert [words(run)["data.train"] for run in runs.values()] == ["1", "20"]
    assert [people(run) for run in runs.values()] == [{"one-1", "two-1"}] * 2


def test_panel_takes_part_at_every_size(experiment: PeopleExperiment) -> None:
    runs = size_runs(experiment, 5, [1, 2, 4], 2)
    assert [len(federations) for federations in runs.values()] == [2, 1, 1]
    (panel,) = [people(run) for run in runs[2]]
    assert set().union(*(people(run) for run in runs[1])) == panel
    assert panel < people(runs[4][0]) <= names(experiment.members(5))
    assert len(people(runs[4][0])) == 4


def test_private_runs_have_their_own_settings(experiment: PeopleExperiment) -> None:
    runs = private_runs(experiment, 5)
    assert {form: len(found) for form, found in runs.items()} == {"reference": 2, "p": 2}
    assert words(runs["p"][0])["x"] == "1"
    assert all("personalization" not in words(run) for found in runs.values() for run in found)


def test_local_training_has_the_same_base_and_letters(experiment: PeopleExperiment) -> None:
    task = experiment.local(5, 3, [], 10)
    found = words(FederationRun("local", task.overrides))
    assert found["base.compute_dtype"] == "bf16"
    assert "personalization" not in found
    assert found["evaluation.timesteps"] == "2"
    run = words(member_runs(experiment, 5)[0])
    assert all(found[key] == run[key] for key in ("data.train", "data.validation", "data.test", "evaluation.timesteps"))
    assert people(FederationRun("local", task.overrides)) == {"one-1", "one-2", "two-1"}
