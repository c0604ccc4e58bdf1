"""Training and evaluation of the judge.

It learns from three sources: typefaces as they are, typefaces drawn with a pen, and handwriting of people.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from typefaces.dataset import GLYPHS, Typeface
from typefaces.judge import STYLE, Judge, JudgeNetwork, legible, merge_classes, style_center, style_match
from typefaces.people import Hand
from typefaces.pretraining.corpus import Jitter, apply_jitter, warp
from typefaces.pretraining.pen import center_lines, draw, draw_radii
from typefaces.strokes import normalize

STYLES = Jitter(width=0.2, slant=0.35, weight=0.8)  # creates another style of a family, equal for all its glyphs
PLACES = Jitter(shift=0.06, width=0.05, height=0.08, slant=0.03, weight=0.15)  # position and size of a glyph
BENDS = ((0.05, 4),)  # reach and cells of smooth distortions
PEN_STYLES = Jitter(width=0.25, height=0.12, slant=0.45)
PEN_PLACES = Jitter(shift=0.08, width=0.1, height=0.12, slant=0.08)
HANDS = Jitter(shift=0.1, width=0.25, height=0.25, slant=0.35, weight=0.9)  # of a handwritten character
HAND_BENDS = ((0.1, 4), (0.03, 8))  # also of glyphs drawn with a pen
TREMOR = 0.1  # relative change of the radius from glyph to glyph
SHARPNESS = 20.0  # inverse temperature of the style logits


class JudgeTrainee(nn.Module):
    """Judge with an additional head for training, which has one unit direction per style."""

    def __init__(self, *, styles: int, widths: Sequence[int], dropout: float) -> None:
        super().__init__()
        self.judge = JudgeNetwork(widths, dropout=dropout)
        self.directions = nn.Parameter(torch.randn(styles, STYLE))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map images [B, 1, 64, 64] to (glyph logits [B, 62], style logits [B, styles])."""
        glyphs, style = self.judge(images)
        return glyphs, SHARPNESS * style @ F.normalize(self.directions, dim=1).T


class Characters(NamedTuple):
    """Augmented pictures [n, 1, 64, 64] in [-1, 1] with their glyphs [n] and styles [n]."""

    pictures: Tensor
    glyphs: Tensor
    styles: Tensor


class CharacterSource(Protocol):
    """CharacterSource of training examples."""

    styles: int
    """Number of styles that it distinguishes."""

    def sample(self, count: int, generator: Generator) -> Characters:
        """Draw random characters."""
        ...


class Printed:
    """Typefaces, each in several styles.

    Args:
        images: uint8 [families × 62, 1, 64, 64].
        table: augmentation of each style [families × styles, 6], a family's styles in consecutive rows.
        places: augmentation of each glyph.
        bends: reach and cells of its smooth distortions.
    """

    def __init__(
        self,
        images: Tensor,
        table: Tensor,
        *,
        places: Jitter = PLACES,
        bends: Sequence[tuple[float, int]] = BENDS,
    ) -> None:
        self.styles = len(table)
        self._images, self._table, self._places, self._bends = images, table, places, bends

    def sample(self, count: int, generator: Generator) -> Characters:
        """Draw random characters in random styles."""
        styles = torch.randint(self.styles, (count,), generator=generator, device=self._images.device)
        glyphs = torch.randint(len(GLYPHS), (count,), generator=generator, device=self._images.device)
        family = styles // (self.styles * len(GLYPHS) // len(self._images))
        pictures = apply_jitter(normalize(self._images[family * len(GLYPHS) + glyphs]), self._table[styles])
        pictures = apply_jitter(pictures, self._places.draw(count, generator))
        return Characters(_bend(pictures, self._bends, generator), glyphs, styles)


class Penned:
    """Typefaces drawn with a pen. Each style has its own width of the pen, so that `table` changes no stroke's weight.

    Args:
        images: uint8 [families × 62, 1, 64, 64].
        table: augmentation of each style, as for `Printed`.
        generator: generator of the pens.
    """

    def __init__(self, images: Tensor, table: Tensor, generator: Generator) -> None:
        self.styles = len(table)
        self._lines = Printed(center_lines(images), table, places=PEN_PLACES, bends=HAND_BENDS)
        self._radii = draw_radii(self.styles, generator)

    def sample(self, count: int, generator: Generator) -> Characters:
        """Draw random characters in random styles."""
        nearness, glyphs, styles = self._lines.sample(count, generator)
        tremor = 1 + TREMOR * (2 * torch.rand(count, generator=generator, device=nearness.device) - 1)
        return Characters(draw(nearness, self._radii[styles] * tremor), glyphs, styles)


class Written:
    """Handwriting; each person is a style."""

    def __init__(self, hands: Sequence[Hand], device: torch.device) -> None:
        self.styles = len(hands)
        self._images = torch.from_numpy(np.concatenate([hand.images for hand in hands]))[:, None].to(device)
        self._glyphs = torch.from_numpy(np.concatenate([hand.classes for hand in hands])).to(device)
        counts = torch.tensor([len(hand.images) for hand in hands])
        self._people = torch.arange(len(hands)).repeat_interleave(counts).to(device)

    def sample(self, count: int, generator: Generator) -> Characters:
        """Draw random characters of random people."""
        rows = torch.randint(len(self._images), (count,), generator=generator, device=self._images.device)
        pictures = apply_jitter(normalize(self._images[rows]), HANDS.draw(count, generator))
        return Characters(_bend(pictures, HAND_BENDS, generator), self._glyphs[rows], self._people[rows])


def judge_loss(
    network: Callable[[Tensor], tuple[Tensor, Tensor]],
    sources: Sequence[tuple[CharacterSource, int]],
    *,
    style: float,
    smoothing: float,
    generator: Generator,
) -> Tensor:
    """Return glyph cross-entropy + `style` × cosine-softmax cross-entropy (Wang et al., 2018) of a random batch.

    Args:
        network: images [B, 1, 64, 64] -> (glyph logits, style logits); styles of later sources follow those of earlier.
        sources: sources, and the number of examples of each.
        style: weight of the second term.
        smoothing: label smoothing of glyphs.
        generator: generator of batch and augmentation.
    """
    parts, first = [], 0
    for source, count in sources:
        drawn = source.sample(count, generator)
        parts.append(drawn._replace(styles=drawn.styles + first))
        first += source.styles
    pictures, glyphs, styles = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    glyph_logits, style_logits = network(pictures)
    return F.cross_entropy(glyph_logits.float(), glyphs, label_smoothing=smoothing) + style * F.cross_entropy(
        style_logits.float(), styles
    )


def _bend(pictures: Tensor, bends: Sequence[tuple[float, int]], generator: Generator) -> Tensor:
    for reach, cells in bends:
        pictures = warp(pictures, reach, generator, cells=cells)
    return pictures


def style_table(families: int, styles: int, generator: Generator, *, jitter: Jitter = STYLES) -> Tensor:
    """Draw augmentations; the first style of each family is the family itself.

    Args:
        families: number of families.
        styles: number of styles per family.
        generator: generator of the augmentations.
        jitter: their ranges.

    Returns:
        [families × styles, 6].
    """
    table = jitter.draw(families * styles, generator)
    table[::styles] = 0
    return table


def read_rate(judge: Judge, hands: Sequence[Hand]) -> dict[str, float]:
    """Measure the fraction of people's characters that are read right: exactly, and after merging.

    Returns:
        `people`, `strict`, `merged`, and `worst`, the merged fraction of the person who is read worst.
    """
    strict, merged = [], []
    for hand in hands:
        read = judge.read(hand.images)
        strict.append(read == hand.classes)
        merged.append(legible(read, hand.classes))
    return {
        "people": len(hands),
        "strict": float(np.concatenate(strict).mean()),
        "merged": float(np.concatenate(merged).mean()),
        "worst": min(float(right.mean()) for right in merged),
    }


def measure(judge: Judge, families: Sequence[Typeface]) -> dict[str, float]:
    """Measure reading accuracy, and how well styles of unseen families are distinguished.

    Glyphs at even positions of a family's `order` define its style, those at odd positions are queries. `retrieval_1`
    is the fraction of single glyphs, `retrieval_5` of means of five, that are nearest to their own family;
    `style_match` is that of single real glyphs.
    """
    truth = np.arange(len(GLYPHS))
    read = [judge.read(family.images) for family in families]
    known, queries = [], []
    for family in families:
        styles = judge.embed(family.images)
        order = list(family.order)
        known.append(styles[order[::2]])
        queries.append(styles[order[1::2]])
    centers = np.stack([style_center(styles) for styles in known])
    singles, fives, matches = [], [], []
    for i, styles in enumerate(queries):
        singles.append((styles @ centers.T).argmax(axis=1) == i)
        groups = np.stack([style_center(styles[j : j + 5]) for j in range(0, len(styles) - 4, 5)])
        fives.append((groups @ centers.T).argmax(axis=1) == i)
        matches.append(style_match(styles, known[i], known[:i] + known[i + 1 :]))
    return {
        "families": len(families),
        "strict": float(np.mean([r == truth for r in read])),
        "merged": float(np.mean([legible(r, merge_classes(truth)) for r in read])),
        "retrieval_1": float(np.mean(singles)),
        "retrieval_5": float(np.mean(fives)),
        "style_match": float(np.mean(matches)),
    }
