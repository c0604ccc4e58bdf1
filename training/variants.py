"""Variants of a picture in training: its captions, its mirror image, and no caption.

Each visit of a picture draws one of its variants from the job's own stream. Every variant is an example, so passes and
slots don't change. Private jobs have no variants: they take the first caption of each picture (`training.jobs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from common import counter_rng


class _Captioned(Protocol):
    @property
    def captions(self) -> tuple[str, ...]: ...


class VariantOptions(NamedTuple):
    """Choices of the owner."""

    captions: bool = False  # all captions of a picture; False: the first
    flip: bool = False  # the mirror image too
    dropout: float = 0.0  # probability of the unconditional caption, for classifier-free guidance (arXiv:2207.12598)


PLAIN = VariantOptions()
"""One example for each picture, with its first caption."""


ALL_CAPTIONS = VariantOptions(captions=True)
"""An example for each caption of a picture."""


class Variant(NamedTuple):
    """One example of a picture."""

    picture: int
    flipped: bool
    caption: str | None


class Variants(NamedTuple):
    """Numbers of variants: the examples of a picture are consecutive, those without a caption are the last of them."""

    captioned: tuple[int, ...]  # by picture
    without: int  # variants without a caption, for each picture
    dropout: float  # probability of one of these

    @property
    def examples(self) -> int:
        """Number of examples of all pictures."""
        return sum(self.captioned) + self.without * len(self.captioned)

    @property
    def first(self) -> np.ndarray:
        """Index of the first example of each picture, int64."""
        return np.cumsum([0, *self.captioned[:-1]]) + self.without * np.arange(len(self.captioned))

    def draw(self, pictures: np.ndarray, key: int) -> np.ndarray:
        """Draw an example of each picture, by the stream with this key.

        Args:
            pictures: int64 [n].
            key: key of the draws.

        Returns:
            Indices of examples, int64 [n].
        """
        keys = counter_rng.child(key, np.arange(len(pictures)))
        captioned = np.array(self.captioned, np.int64)[pictures]
        place = counter_rng.uniform(keys)
        dropped = counter_rng.uniform(counter_rng.child(keys, 1)) < self.dropout
        offset = np.where(dropped, captioned + np.floor(place * self.without), np.floor(place * captioned))
        return self.first[pictures] + offset.astype(np.int64)


def list_variants(pictures: Sequence[_Captioned], options: VariantOptions) -> list[Variant]:
    """List the examples of pictures in their order."""
    sides = (False, True) if options.flip else (False,)
    return [
        Variant(index, flipped, caption)
        for index, picture in enumerate(pictures)
        for caption in (*_captions(picture, options), *([None] if options.dropout else []))
        for flipped in sides
    ]


def count_variants(pictures: Sequence[_Captioned], options: VariantOptions) -> Variants | None:
    """Count the examples that `list_variants` lists; None if there is one for each picture."""
    sides = 2 if options.flip else 1
    found = Variants(
        captioned=tuple(sides * len(_captions(picture, options)) for picture in pictures),
        without=sides if options.dropout else 0,
        dropout=options.dropout,
    )
    return None if found.examples == len(pictures) else found


def _captions(picture: _Captioned, options: VariantOptions) -> tuple[str, ...]:
    return picture.captions if options.captions else picture.captions[:1]
