"""Glyphs as tensors: their range and the width of strokes."""

from __future__ import annotations

import pytest
import torch

from typefaces.strokes import normalize, thicken


def test_range_is_minus_one_to_one() -> None:
    assert normalize(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


@pytest.mark.parametrize(("pixels", "width"), [(-1.0, 2.0), (-0.5, 3.0), (0.0, 4.0), (0.5, 5.0), (1.0, 6.0)])
def test_bar_gains_pixels_on_both_sides(pixels: float, width: float) -> None:
    ink = torch.zeros(1, 1, 12, 12)
    ink[..., 4:8] = 2.0
    row = thicken(ink, torch.tensor([pixels]))[0, 0, 6]
    assert row.sum() / 2 == width
    assert row.flip(0).equal(row)


def test_each_image_has_its_own_change() -> None:
    ink = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    light, same, bold = thicken(ink, torch.tensor([-0.5, 0.0, 0.5]))
    assert (light <= ink[0]).all()
    assert same.equal(ink[1])
    assert (bold >= ink[2]).all()
