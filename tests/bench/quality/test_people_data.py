"""Tests of the people of a file: selections, folds and files of some of them."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from bench.quality.people_data import (
    HandwritingPerson,
    by_donor,
    cohorts_of,
    folds,
    read_people,
    select,
    write_subset,
)
from common.errors import AntherError
from tests.helpers.people import characters, write
from typefaces.dataset import GLYPHS

PEOPLE = [HandwritingPerson(f"{donor}-{n}", "test", donor, 20 + n) for donor in ("one", "two") for n in range(5)]


def test_people_are_read_with_donor_and_letters(tmp_path: Path) -> None:
    rows = characters(["one-1"], GLYPHS[:3], role="test") + characters(["two-1"], GLYPHS[:4], role="extra")
    rows += characters(["one-1"], GLYPHS[:2], role="test")  # second samples
    file = write(tmp_path / "people.parquet", rows)
    assert sorted(read_people(file)) == [("one-1", "test", "one", 3), ("two-1", "extra", "two", 4)]
    named = write(tmp_path / "named.parquet", [{**row, "donor": "x"} for row in rows])
    assert {person.donor for person in read_people(named)} == {"x"}


def test_people_with_too_few_letters_are_left_out() -> None:
    assert [person.letters for person in select(PEOPLE, "test", 3)] == [23, 24, 23, 24]
    with pytest.raises(AntherError, match="--role test: no person of this role has 25 letters; roles are test"):
        select(PEOPLE, "test", 5)


@pytest.mark.parametrize("count", [1, 3, 4])
def test_each_person_is_in_one_fold(count: int) -> None:
    parts = folds(PEOPLE, count)
    assert sorted(name for part in parts for name in part) == sorted(person.name for person in PEOPLE)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_donors_of_few_people_are_left_out() -> None:
    assert by_donor(PEOPLE[:8], 4) == {"one": [f"one-{n}" for n in range(5)]}


@pytest.mark.parametrize(("size", "count"), [(2, 3), (3, 2), (4, 2), (5, 1), (9, 1)])
def test_every_member_of_a_panel_takes_part(size: int, count: int) -> None:
    panel, others = [*"abcde"], [*"uvwxyz"]
    cohorts = cohorts_of(panel, others, size)
    assert [len(set(cohort)) for cohort in cohorts] == [size] * count
    assert set(panel) <= set().union(*cohorts)
    if size >= 5:
        assert cohorts[0] == [*panel, *others[: size - 5]]


def test_subset_has_all_rows_of_some_people(tmp_path: Path) -> None:
    file = write(tmp_path / "people.parquet", characters(["ann", "bo", "cy"], GLYPHS[:3], role="test"))
    table = pq.read_table(write_subset(file, ["cy", "ann"], tmp_path / "out" / "some.parquet"))
    assert table.column("person").to_pylist() == ["ann"] * 3 + ["cy"] * 3
    assert table.schema == pq.read_schema(file)
