"""Order of a writer's glyphs, which determines its split into training pool, validation and test."""

from __future__ import annotations

import random
import zlib

from typefaces.dataset import GLYPHS, MERGED, POOL, TEST, VALIDATION

# A merged class is never divided, so that no test glyph was in training under another name.


def order(name: str) -> tuple[int, ...]:
    """Return a permutation of range(62), seeded by the writer's name: 20 training, 10 validation, 32 test glyphs."""
    rng = random.Random(zlib.crc32(name.encode()))
    while True:
        sides = deal(rng)
        if sides is not None and sensible(sides[0]):
            break
    pool, validation, test = ("".join(rng.sample(side, len(side))) for side in sides)
    first = opening(pool, rng)
    pool = first + "".join(glyph for glyph in pool if glyph not in first)
    return tuple(GLYPHS.index(glyph) for glyph in pool + validation + test)


def deal(rng: random.Random) -> list[str] | None:
    """Deal shuffled classes and single glyphs to sides of 20, 10 and 32; None if they don't fit exactly."""
    singles = [glyph for glyph in GLYPHS if not any(glyph in group for group in MERGED)]
    groups = rng.sample([*MERGED, *singles], len(MERGED) + len(singles))
    sides = ["", "", ""]
    for group in groups:
        free = [side for side, size in enumerate((POOL, VALIDATION, TEST)) if len(sides[side]) + len(group) <= size]
        if not free:
            return None
        sides[free[0]] += group
    return sides


def sensible(pool: str) -> bool:
    """Return whether a pool has enough glyphs of each case for `opening`."""
    return sum(map(str.islower, pool)) >= 6 and sum(map(str.isupper, pool)) >= 4


def opening(pool: str, rng: random.Random) -> str:
    """Choose the five default training glyphs: three lowercase, one capital, and any other, of distinct classes."""
    classes = {glyph: group for group in MERGED for glyph in group}
    chosen: list[str] = []
    for wanted in (str.islower, str.isupper, str.islower, str.islower, str.isalnum):
        taken = {classes.get(glyph, glyph) for glyph in chosen}
        chosen.append(rng.choice([g for g in pool if wanted(g) and classes.get(g, g) not in taken]))
    return "".join(chosen)
