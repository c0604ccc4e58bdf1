"""The order of a writer's glyphs, which fixes its split into train pool, validation and test."""

from __future__ import annotations

import random
import zlib

from typefaces.dataset import GLYPHS, MERGED, POOL, TEST, VALIDATION

# One side of the split holds a whole merged class,
# so that no test glyph has been seen in training under another name.


def order(name: str) -> tuple[int, ...]:
    """A permutation of range(62), seeded by the writer's name: 20 for training, 10 to stop, 32 to measure."""
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
    """Classes and single glyphs, shuffled and dealt to sides of 20, 10 and 32; None if they do not come out even."""
    singles = [glyph for glyph in GLYPHS if not any(glyph in group for group in MERGED)]
    groups = rng.sample([*MERGED, *singles], len(MERGED) + len(singles))
    sides = ["", "", ""]
    for group in groups:
        room = [side for side, size in enumerate((POOL, VALIDATION, TEST)) if len(sides[side]) + len(group) <= size]
        if not room:
            return None
        sides[room[0]] += group
    return sides


def sensible(pool: str) -> bool:
    """Enough of each case for a good opening."""
    return sum(map(str.islower, pool)) >= 6 and sum(map(str.isupper, pool)) >= 4


def opening(pool: str, rng: random.Random) -> str:
    """The five glyphs that train by default: three lower case, one capital and any other, no two of one class."""
    classes = {glyph: group for group in MERGED for glyph in group}
    chosen: list[str] = []
    for wanted in (str.islower, str.isupper, str.islower, str.islower, str.isalnum):
        taken = {classes.get(glyph, glyph) for glyph in chosen}
        chosen.append(rng.choice([g for g in pool if wanted(g) and classes.get(g, g) not in taken]))
    return "".join(chosen)
