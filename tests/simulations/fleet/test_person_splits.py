"""Splits of one person's pictures: stable, disjoint, and by caption."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import AntherError
from simulations.fleet.person_splits import Sizes, split_person


@dataclass(frozen=True)
class Shot:
    """Picture of a test."""

    caption: str
    split: str | None = None
    sample: int = 0


LETTERS = [Shot(letter, sample=sample) for letter in "abcdefghijklmnopqrst" for sample in (0, 1)]


def test_sizes_and_disjoint_captions() -> None:
    train, validation, test = split_person("ann", LETTERS, Sizes(5, 4, 6))
    assert (len(train), len(validation), len(test)) == (5, 4, 6)
    captions = [{shot.caption for shot in part} for part in (train, validation, test)]
    assert sum(map(len, captions)) == 15  # one picture of each caption, none in two splits
    assert len(set.union(*captions)) == 15
    assert all(shot.sample == 0 for part in (train, validation, test) for shot in part)


@given(st.integers(1, 20), st.integers(1, 20))
def test_smaller_training_set_is_a_prefix(one: int, other: int) -> None:
    first, second = (split_person("ann", LETTERS, Sizes(train, 4, 6)) for train in (one, other))
    shorter, longer = sorted([first.train, second.train], key=len)
    assert list(longer[: len(shorter)]) == list(shorter)
    assert (first.validation, first.test) == (second.validation, second.test)


def test_second_pictures_of_captions_come_last() -> None:
    train = split_person("ann", LETTERS, Sizes(20, 4, 6)).train
    assert [shot.sample for shot in train] == [0] * 10 + [1] * 10
    assert [shot.caption for shot in train[:10]] == [shot.caption for shot in train[10:]]
    with pytest.raises(AntherError, match=r"ann: has 40 pictures, 20 of them for train, fewer than data\.train=21"):
        split_person("ann", LETTERS, Sizes(21, 4, 6))


def test_people_have_different_orders() -> None:
    orders = {tuple(split_person(name, LETTERS, Sizes(5, 4, 6)).test) for name in ("ann", "bo", "cy")}
    assert len(orders) == 3


def test_few_captions_are_split_by_picture() -> None:
    dogs = [Shot(f"dog {number % 2}", sample=number) for number in range(20)]
    train, validation, test = split_person("ann", dogs, Sizes(8, 5, 6))
    assert len({*train, *validation, *test}) == 19
    assert {shot.caption for shot in test} == {"dog 0", "dog 1"}
    with pytest.raises(AntherError, match=r"ann: has 20 pictures, 9 of them for train, fewer than data\.train=10"):
        split_person("ann", dogs, Sizes(10, 5, 6))


def test_given_splits_are_used() -> None:
    shots = [Shot(f"dog {number % 4}", ("train", "validation", "test")[number % 3], number) for number in range(30)]
    chosen = split_person("ann", shots, Sizes(6, 2, 3))
    for name, part in zip(("train", "validation", "test"), chosen, strict=True):
        assert {shot.split for shot in part} == {name}
    assert len({shot.caption for shot in chosen.train[:4]}) == 4  # one picture of each caption first
    with pytest.raises(AntherError, match=r"10 of them for validation, fewer than data\.validation=11"):
        split_person("ann", shots, Sizes(6, 11, 3))
