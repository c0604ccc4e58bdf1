"""Who takes part."""

from __future__ import annotations

from pathlib import Path

import pytest

from conf.compose import compose
from conf.errors import AntherError
from models.base import Base
from simulations.fleet import participants, slug, writers
from tests.simulations.test_run import own_pictures


def names(base: Base, folder: Path, overrides: str) -> list[str]:
    return [person.name for person in participants(compose(overrides), base, folder)]


def test_folders_take_the_place_of_writers(base: Base, tmp_path: Path) -> None:
    mine, yours = own_pictures(tmp_path / "mine"), own_pictures(tmp_path / "yours")
    found = names(base, tmp_path / "fleet", f"data.writers=3 'data.pictures=[{mine}]'")
    assert len(found) == 3
    assert "mine" in found
    assert names(base, tmp_path / "fleet", f"data.writers=1 'data.pictures=[{mine},{yours}]'") == ["mine", "yours"]
    assert names(base, tmp_path / "fleet", f"data.writers=0 'data.pictures=[{mine}]'") == ["mine"]


def test_profiles_are_dealt_in_turn_and_reports_say_so(base: Base, tmp_path: Path) -> None:
    config = compose("data.writers=7")
    people = participants(config, base, tmp_path)
    kinds = [profile.name for profile in config.fleet.profiles]
    assert [person.profile for person in people] == [kinds[i % len(kinds)] for i in range(7)]
    assert [person.name for person in people] == sorted(person.name for person in people)
    assert all(person.device.report.base == base.hash for person in people)
    assert not (tmp_path / people[0].name).exists()  # nothing is written before the run is claimed


def test_splits_are_as_large_as_asked_and_disjoint() -> None:
    for _, _, pictures in writers(compose("data.train=4 data.validation=3 data.test=5").data):
        assert tuple(map(len, pictures)) == (4, 3, 5)
        assert len({picture.caption for split in pictures for picture in split}) == 12


def test_too_many_writers_are_refused() -> None:
    with pytest.raises(AntherError, match="only 20 development writers"):
        writers(compose("data.writers=21").data)


def test_folders_of_one_name_are_refused(base: Base, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    folders = [own_pictures(tmp_path / parent / "cats") for parent in ("one", "two")]
    with pytest.raises(AntherError, match="two folders are called cats"):
        names(base, tmp_path / "fleet", f"'data.pictures=[{folders[0]},{folders[1]}]'")


def test_names_are_safe_for_files() -> None:
    assert slug("../My cat! №5") == "my-cat-5"
    assert slug("猫") == "unnamed"
