"""Split the pictures of one person into training, validation and test.

The order is a hash of names, independent of the requested numbers: a smaller training set is a prefix of a larger one,
and validation and test don't depend on the number of training pictures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

from client.data import SPLITS
from common.errors import AntherError, shorten
from common.seeding import derive_seed


class Captioned(Protocol):
    """Picture of a person."""

    @property
    def caption(self) -> str: ...

    @property
    def split(self) -> str | None:
        """Its split; None: pictures aren't split."""
        ...


P = TypeVar("P", bound=Captioned)


class Sizes(NamedTuple):
    """Number of pictures in each split."""

    train: int
    validation: int
    test: int


class PersonSplit(NamedTuple, Generic[P]):
    """Pictures of one person."""

    train: Sequence[P]
    validation: Sequence[P]
    test: Sequence[P]


def split_person(person: str, pictures: Sequence[P], sizes: Sizes) -> PersonSplit[P]:
    """Choose pictures for each split.

    If the pictures name their splits, these are used. Otherwise a caption belongs to one split only, if there are
    enough captions, and held-out splits take one picture of each of their captions. Training takes one picture of each
    caption before it takes a second one.

    Args:
        person: name of the person.
        pictures: pictures of the person; those of one caption in order of preference.
        sizes: number of pictures in each split.

    Raises:
        AntherError: a split has too few pictures.
    """
    ordered = sorted(pictures, key=lambda picture: derive_seed("people", person, picture.caption))  # stable
    if any(picture.split is not None for picture in pictures):
        available = [_one_per_caption_first([p for p in ordered if p.split == split]) for split in SPLITS]
    else:
        available = _by_caption(ordered, sizes) or _by_picture(person, ordered, sizes)
    for split, given, needed in zip(SPLITS, available, sizes, strict=True):
        if len(given) < needed:
            raise AntherError(
                f"{shorten(person)}: has {len(pictures)} pictures, {len(given)} of them for {split}, fewer than "
                f"data.{split}={needed}"
            )
    return PersonSplit(*(given[:needed] for given, needed in zip(available, sizes, strict=True)))


def _by_caption(ordered: Sequence[P], sizes: Sizes) -> list[list[P]] | None:
    """Split by caption; None if there are too few captions."""
    captions = list(dict.fromkeys(picture.caption for picture in ordered))
    held_out = sizes.validation + sizes.test
    if len(captions) <= held_out:
        return None
    test, validation = set(captions[: sizes.test]), set(captions[sizes.test : held_out])
    first = _one_per_caption_first(ordered)
    return [
        [picture for picture in first if picture.caption not in test | validation],
        [picture for picture in first[: len(captions)] if picture.caption in validation],
        [picture for picture in first[: len(captions)] if picture.caption in test],
    ]


def _by_picture(person: str, ordered: Sequence[P], sizes: Sizes) -> list[list[P]]:
    """Split by picture: too few captions differ."""
    keys = [derive_seed("people", person, picture.caption, nth) for nth, picture in _numbered(ordered)]
    mixed = [ordered[i] for i in sorted(range(len(ordered)), key=keys.__getitem__)]
    held_out = sizes.validation + sizes.test
    return [mixed[held_out:], mixed[sizes.test : held_out], mixed[: sizes.test]]


def _one_per_caption_first(pictures: Sequence[P]) -> list[P]:
    """Move second pictures of captions behind the first ones, third ones behind these, and so on."""
    return [picture for _, picture in sorted(_numbered(pictures), key=lambda pair: pair[0])]  # stable


def _numbered(pictures: Sequence[P]) -> list[tuple[int, P]]:
    """Number the pictures of each caption, from 0."""
    seen: Counter[str] = Counter()
    numbered = []
    for picture in pictures:
        numbered.append((seen[picture.caption], picture))
        seen[picture.caption] += 1
    return numbered
