"""Glyphs as tensors, and the width of their strokes: for the judge and for training."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def normalize(images: Tensor) -> Tensor:
    """Convert uint8 [..., 64, 64], 0 = ink, to float in [-1, 1], -1 = ink."""
    return images.float() / 127.5 - 1


def thicken(ink: Tensor, pixels: Tensor) -> Tensor:
    """Dilate ink [B, 1, H, W] (paper 0) by `pixels` [B] in [-1, 1]; negative values erode."""
    dilated = F.max_pool2d(ink, 3, stride=1, padding=1)
    eroded = -F.max_pool2d(-ink, 3, stride=1, padding=1)
    amount = pixels[:, None, None, None]
    return ink + amount.clamp(min=0) * (dilated - ink) + amount.clamp(max=0).abs() * (eroded - ink)
