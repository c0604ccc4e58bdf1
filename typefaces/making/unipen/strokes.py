"""Select characters by geometry: remove duplicates and broken segments, and put the cleanest first.

Sizes are relative to a person's *cap height*, the height of capital letters, ascenders and digits.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from typefaces.making.unipen.format import Points

TALL = "ABDEFHKLNRTbdhkl0123456789"
"""Glyphs as high as a capital letter."""
SHORT_TO_CAP = 1.4
"""Cap height over the median height of all glyphs, for a person with fewer than three tall ones."""
LEAST_CAP = 0.01  # mm; ink without height must not divide by zero, which would spoil the medians over people
SPIKE, BRIDGE = 12.0, 6.0
"""Isolated points further than SPIKE median steps from both neighbors, which are closer than BRIDGE, are errors of the
digitizer."""

Hand = Mapping[str, Sequence["WrittenGlyph"]]
"""A person's characters by glyph."""


@dataclass(frozen=True, eq=False)
class WrittenGlyph:
    """A character that a person wrote once."""

    person: str
    glyph: str
    strokes: tuple[Points, ...]
    """Positions [n, 2] of each stroke in mm, y up."""
    page: tuple[Path, ...]
    """Files of its ink; characters of one page were written together."""
    position: int
    """Number of its first component on the page."""
    bad: bool
    """Whether the donor marked it as illegible."""

    @property
    def donor(self) -> str:
        return self.person.split("/")[0]

    @cached_property
    def low(self) -> Points:
        """Left and bottom [2] of the ink in mm."""
        return np.concatenate(self.strokes).min(axis=0)

    @cached_property
    def size(self) -> Points:
        """Width and height [2] of the ink in mm."""
        return np.ptp(np.concatenate(self.strokes), axis=0)

    @property
    def width(self) -> float:
        return float(self.size[0])

    @property
    def height(self) -> float:
        return float(self.size[1])


class UsualShape(NamedTuple):
    """Usual size of a glyph in cap heights."""

    width: float
    height: float


def by_person(glyphs: Iterable[WrittenGlyph]) -> dict[str, dict[str, list[WrittenGlyph]]]:
    """Group characters by person and glyph, without spikes and without repetitions of the same ink.

    Files of digits, capitals and lowercase letters overlap, and words repeat segments of characters.
    """
    people: dict[str, dict[str, list[WrittenGlyph]]] = {}
    seen = set()
    for each in glyphs:
        ink = (each.person, each.glyph, tuple(stroke.tobytes() for stroke in each.strokes))
        if ink not in seen:
            seen.add(ink)
            strokes = tuple(map(without_spikes, each.strokes))
            cleaned = WrittenGlyph(each.person, each.glyph, strokes, each.page, each.position, each.bad)
            people.setdefault(each.person, {}).setdefault(each.glyph, []).append(cleaned)
    return people


def without_spikes(stroke: Points) -> Points:
    """Remove isolated points far from both neighbors, which are close to each other."""
    steps = np.linalg.norm(np.diff(stroke, axis=0), axis=1)
    if len(stroke) < 3 or not steps.any():
        return stroke
    usual = np.median(steps[steps > 0])
    bridges = np.linalg.norm(stroke[2:] - stroke[:-2], axis=1)
    spikes = (np.minimum(steps[:-1], steps[1:]) > SPIKE * usual) & (bridges < BRIDGE * usual)
    return stroke[np.concatenate([[True], ~spikes, [True]])]


def cap_height(hand: Hand) -> float:
    """Return a person's cap height in mm."""
    heights = [median_height(samples) for samples in hand.values()]
    tall = [median_height(hand[glyph]) for glyph in TALL if glyph in hand]
    height = np.median(tall) if len(tall) >= 3 else SHORT_TO_CAP * np.median(heights)
    return max(float(height), LEAST_CAP)


def median_height(samples: Sequence[WrittenGlyph]) -> float:
    """Return the median height in mm."""
    return float(np.median([sample.height for sample in samples]))


def usual_shapes(people: Iterable[Hand]) -> dict[str, UsualShape]:
    """Return the median over people of each glyph's size."""
    sizes: dict[str, list[Points]] = defaultdict(list)
    for hand in people:
        cap = cap_height(hand)
        for glyph, samples in hand.items():
            sizes[glyph].append(np.median([sample.size for sample in samples], axis=0) / cap)
    return {glyph: UsualShape(*np.median(values, axis=0).tolist()) for glyph, values in sizes.items()}


def cleanest(hand: Hand, usual: Mapping[str, UsualShape]) -> dict[str, list[WrittenGlyph]]:
    """Drop broken characters and sort the others, the one nearest to the person's usual form first.

    Args:
        hand: characters of one person.
        usual: size of each glyph over all people, the reference if the person wrote it less than three times.

    Returns:
        Samples by glyph; no glyph without samples.
    """
    cap, result = cap_height(hand), {}
    for glyph, samples in hand.items():
        shape = usual[glyph]
        if len(samples) >= 3:
            width, height = np.median([sample.size for sample in samples], axis=0)
        else:
            width, height = shape.width * cap, shape.height * cap
        # The order of equally frequent counts is that of the samples.
        (count, _), *_ = Counter(len(sample.strokes) for sample in samples).most_common()
        kept = [
            (oddness(sample, float(width), float(height), count, cap), str(sample.page), sample.position, index)
            for index, sample in enumerate(samples)
            if not broken(sample, shape, cap)
        ]
        if kept:
            result[glyph] = [samples[index] for *_, index in sorted(kept)]
    return result


def oddness(sample: WrittenGlyph, width: float, height: float, strokes: int, cap: float) -> float:
    """Return the distance from the usual form, about 1 for a size off by 40 %.

    Args:
        sample: the character.
        width: usual width in mm.
        height: usual height in mm.
        strokes: usual number of strokes.
        cap: cap height in mm. A share of it is added to sizes, so that narrow glyphs (i, l, 1) don't have large ratios.
    """
    margin = 0.12 * cap
    return (
        abs(math.log((sample.height + margin) / (height + margin))) / 0.35
        + abs(math.log((sample.width + margin) / (width + margin))) / 0.45
        + 0.7 * (len(sample.strokes) != strokes)
        + 0.5 * sample.bad
    )


def broken(sample: WrittenGlyph, usual: UsualShape, cap: float) -> bool:
    """Return whether a segment can't be this character: it holds more, or a part only.

    Args:
        sample: the character.
        usual: size of the glyph over all people.
        cap: cap height in mm.
    """
    width, height = sample.width / cap, sample.height / cap
    return (
        max(width, height) < 0.28
        or width > min(2.6, max(2.2 * usual.width, 0.75 + usual.width))
        or not 0.4 * usual.height <= height <= min(2.3, 2.1 * usual.height)
    )
