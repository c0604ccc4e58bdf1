"""Training and evaluation of the judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from typefaces.dataset import GLYPHS, Typeface
from typefaces.judge import STYLE, Judge, JudgeNetwork, legible, merge_classes, style_center, style_match
from typefaces.pretraining.corpus import Jitter, apply_jitter, normalize, warp

STYLES = Jitter(width=0.2, slant=0.35, weight=0.8)  # creates another style of a family, equal for all its glyphs
PLACES = Jitter(shift=0.06, width=0.05, height=0.08, slant=0.03, weight=0.15)  # position and size of a glyph
BEND = 0.05
SHARPNESS = 20.0  # inverse temperature of the family logits


class JudgeTrainee(nn.Module):
    """Judge with an additional head for training, which has one unit direction per style."""

    def __init__(self, *, styles: int) -> None:
        super().__init__()
        self.judge = JudgeNetwork()
        self.directions = nn.Parameter(torch.randn(styles, STYLE))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map images [B, 1, 64, 64] to (glyph logits [B, 62], style logits [B, styles])."""
        glyphs, style = self.judge(images)
        return glyphs, SHARPNESS * style @ F.normalize(self.directions, dim=1).T


def judge_loss(
    network: Callable[[Tensor], tuple[Tensor, Tensor]],
    images: Tensor,
    *,
    table: Tensor,
    batch: int,
    style: float,
    smoothing: float,
    generator: Generator,
) -> Tensor:
    """Return glyph cross-entropy + `style` × cosine-softmax cross-entropy (Wang et al., 2018) of a random batch.

    Args:
        network: images [B, 1, 64, 64] -> (glyph logits, style logits).
        images: uint8 [families × 62, 1, 64, 64].
        table: augmentation of each style [families × styles, 6], a family's styles in consecutive rows.
        batch: batch size.
        style: weight of the second term.
        smoothing: label smoothing of glyphs.
        generator: generator of batch and augmentation.
    """
    device = images.device
    families = len(images) // len(GLYPHS)
    styles = torch.randint(len(table), (batch,), generator=generator, device=device)
    glyphs = torch.randint(len(GLYPHS), (batch,), generator=generator, device=device)
    family = styles // (len(table) // families)
    pictures = apply_jitter(normalize(images[family * len(GLYPHS) + glyphs]), table[styles])
    pictures = warp(apply_jitter(pictures, PLACES.draw(batch, generator)), BEND, generator)
    glyph_logits, style_logits = network(pictures)
    return F.cross_entropy(glyph_logits.float(), glyphs, label_smoothing=smoothing) + style * F.cross_entropy(
        style_logits.float(), styles
    )


def style_table(families: int, styles: int, generator: Generator) -> Tensor:
    """Draw augmentations; the first style of each family is the family itself.

    Args:
        families: number of families.
        styles: number of styles per family.
        generator: generator of the augmentations.

    Returns:
        [families × styles, 6].
    """
    table = STYLES.draw(families * styles, generator)
    table[::styles] = 0
    return table


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
