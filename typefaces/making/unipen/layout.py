"""Place a person's characters in images: one scale and one baseline per person, centered horizontally by ink.

The bottom of each glyph over the baseline is measured against the characters that were written around it. Where people
wrote in separate boxes there is no common baseline; it is then inferred from the form of each glyph. Heights are in
cap heights unless a unit is named.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from typefaces.dataset import GLYPHS
from typefaces.making.render import SIDE
from typefaces.making.unipen.format import Points
from typefaces.making.unipen.strokes import Hand, WrittenGlyph, cap_height, median_height

PEN = 4.2  # pixels, width of the round pen
MARGIN = 2.0  # pixels without ink around ordinary glyphs
EDGE = 0.5  # pixels without ink around any glyph
BOXED = {"gmd", "imp", "kai", "lav", "pri", "sie", "tos", "uqb", "val"}
"""Donors whose people wrote in boxes, or one letter per file: their characters have no common baseline."""
HANGING = "gjpqy"  # always below the baseline
SOMETIMES_HANGING = {"Q": 1.2, "J": 1.2, "f": 1.2, "z": 1.25}
"""Glyphs that some people let hang, with the height above which they do if there is no measured baseline."""
STANDING = "".join(glyph for glyph in GLYPHS if glyph not in HANGING and glyph not in SOMETIMES_HANGING)
SHORT = "acemnorsuvwxz"
NEIGHBORS, FEWEST_NEIGHBORS = 14, 3
"""Largest and least number of neighbors that determine the baseline at a character."""
LINE_ABOVE, LINE_BELOW = 1.1, 0.6
"""Neighbors whose bottoms are higher or lower than that stand on another line."""
DEEPEST, SHALLOWEST = -0.9, -0.12
"""Limits of the bottom of a hanging glyph."""
UNEVEN = (-0.10, 0.06)
"""Limits of the bottom of a standing glyph."""
TRUSTED = -0.25
"""A person whose hanging glyphs are not at least this deep, by the median, has no measurable baseline."""


class Frame(NamedTuple):
    """A person's scale and baseline."""

    scale: float
    """Pixels per mm."""
    baseline: float
    """Row of the baseline in pixels from the top."""


def place(hand: Mapping[str, Sequence[WrittenGlyph]]) -> dict[str, list[tuple[Points, ...]]]:
    """Place all characters of a person.

    Args:
        hand: samples by glyph, the first one the cleanest.

    Returns:
        Strokes [n, 2] of each sample in pixels, y down, by glyph.
    """
    bottoms = glyph_bottoms(hand)
    frame = fit({glyph: samples[0] for glyph, samples in hand.items()}, bottoms)
    return {glyph: [in_pixels(each, bottoms[glyph], frame) for each in samples] for glyph, samples in hand.items()}


def glyph_bottoms(hand: Hand) -> dict[str, float]:
    """Return the bottom of each glyph in mm over the baseline; negative for hanging glyphs."""
    cap, measured = cap_height(hand), measured_bottoms(hand)
    heights = {glyph: median_height(samples) / cap for glyph, samples in hand.items()}
    short = [heights[glyph] for glyph in SHORT if glyph in hand]
    x_height = float(np.clip(np.median(short), 0.35, 0.8)) if short else 0.58
    result = {}
    for glyph, height in heights.items():
        if glyph in HANGING:
            if (bottom := measured.get(glyph)) is None:
                dotted = glyph == "j" and np.median([len(sample.strokes) for sample in hand[glyph]]) > 1
                bottom = (heights.get("i", 1.0) if dotted else x_height) - height
            limits = DEEPEST, SHALLOWEST
        elif glyph in SOMETIMES_HANGING:
            if (bottom := measured.get(glyph)) is None:
                top = x_height if glyph == "z" else 1.0
                bottom = top - height if height > SOMETIMES_HANGING[glyph] else 0.0
            limits = DEEPEST, UNEVEN[1]
        else:
            bottom, limits = measured.get(glyph, 0.0), UNEVEN
        result[glyph] = cap * float(np.clip(bottom, *limits))
    return result


def measured_bottoms(hand: Hand) -> dict[str, float]:
    """Return the median bottom of each glyph over the local baseline; none if a person has no measurable baseline."""
    cap = cap_height(hand)
    pages: dict[object, list[WrittenGlyph]] = defaultdict(list)
    for samples in hand.values():
        for sample in samples:
            pages[sample.page].append(sample)
    bottoms: dict[str, list[float]] = defaultdict(list)
    for page in pages.values():
        standing = [each for each in page if each.glyph in STANDING and each.donor not in BOXED]
        positions = np.array([each.position for each in standing])
        lows = np.array([each.low[1] for each in standing])
        for sample in page if standing else ():
            over = (lows - sample.low[1]) / cap
            near = np.flatnonzero((over < LINE_BELOW) & (over > -LINE_ABOVE) & (positions != sample.position))
            if len(near) >= FEWEST_NEIGHBORS:
                order = np.argsort(np.abs(positions[near] - sample.position), kind="stable")
                bottoms[sample.glyph].append(-float(np.median(over[near[order[:NEIGHBORS]]])))
    medians = {glyph: float(np.median(values)) for glyph, values in bottoms.items()}
    hanging = [medians[glyph] for glyph in HANGING if glyph in medians]
    return {} if hanging and np.median(hanging) > TRUSTED else medians


def fit(first: Mapping[str, WrittenGlyph], bottoms: Mapping[str, float]) -> Frame:
    """Choose the scale at which ordinary tall, hanging and wide glyphs fill the image.

    Args:
        first: the cleanest sample of each glyph.
        bottoms: bottom of each glyph in mm over the baseline.
    """
    cap = cap_height({glyph: [sample] for glyph, sample in first.items()})
    hanging = {glyph: -bottom for glyph, bottom in bottoms.items() if glyph in "gpqy"}
    ascent = _reach({glyph: bottoms[glyph] + each.height for glyph, each in first.items()}, "bdfhklABDEFHIKLNRT", 75)
    descent = max(0.1 * cap, _reach(hanging, "gpqy", 70)) if hanging else 0.35 * cap
    width = _reach({glyph: each.width for glyph, each in first.items()}, "MWmw", 75)
    space = SIDE - 2 * MARGIN - PEN
    scale = min(space / (ascent + descent), space / max(width, 1e-6))
    return Frame(scale, SIDE / 2 + scale * (ascent - descent) / 2)


def _reach(extents: Mapping[str, float], ordinary: str, percentile: float) -> float:
    """Return a percentile over ordinary glyphs, or over all if there are none of these."""
    values = [extents[glyph] for glyph in ordinary if glyph in extents] or list(extents.values())
    return float(np.percentile(values, percentile))


def in_pixels(sample: WrittenGlyph, bottom: float, frame: Frame) -> tuple[Points, ...]:
    """Convert strokes to pixels; a character that exceeds the image is shrunk towards the baseline by itself.

    Args:
        sample: the character.
        bottom: bottom of the glyph in mm over the baseline.
        frame: the person's scale and baseline.
    """
    limit = PEN / 2 + EDGE
    scale = min(
        frame.scale,
        (frame.baseline - limit) / max(bottom + sample.height, 1e-6),
        (SIDE - limit - frame.baseline) / max(-bottom, 1e-6),
        (SIDE - 2 * limit) / max(sample.width, 1e-6),
    )
    center, low = sample.low[0] + sample.width / 2, sample.low[1]
    return tuple(
        np.stack(
            [
                SIDE / 2 + scale * (stroke[:, 0] - center),
                frame.baseline - scale * (stroke[:, 1] - low + bottom),
            ],
            axis=1,
        )
        for stroke in sample.strokes
    )
