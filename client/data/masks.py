"""Masks of pictures: `cat.mask.png` beside `cat.jpg` weights the loss, white fully and black not at all.

The practice is known as masked loss (`--masked_loss` of kohya's sd-scripts, masked training of OneTrainer). A mask is
averaged over the area of each latent position. The weights of a picture have a mean of 1, so that a small subject has
no smaller gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from client.data.reading import decode, open_picture
from common.errors import AntherError
from training.jobs import Picture
from training.variants import VariantOptions, list_variants

if TYPE_CHECKING:
    from torch import Tensor

_SIDE = 512  # pixels: larger masks are averaged when they are read
_TOLERANCE = 0.02  # of the ratio of sides


def read_mask(path: Path, picture: np.ndarray) -> np.ndarray:
    """Read a mask as float32 [H, W].

    Args:
        path: the mask's file.
        picture: pixels of its picture, of any size.

    Raises:
        AntherError: it is no picture, black everywhere, or of another shape than its picture.
    """
    with open_picture(path) as file:
        levels = decode(path, file, background="black", side=_SIDE).astype(np.float32)
    mask = levels if levels.ndim == 2 else levels.mean(2)
    if not mask.any():
        raise AntherError(f"{path}: is black everywhere; make the parts white that are to be learned")
    ratio = (mask.shape[0] * picture.shape[1]) / (mask.shape[1] * picture.shape[0])
    if abs(ratio - 1) > _TOLERANCE:
        raise AntherError(f"{path}: has another shape than its picture; save it in the picture's size")
    return mask


def latent_weights(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Average a mask over each latent position of the centered crop, float32 [height, width] with a mean of 1.

    Args:
        mask: [H, W], not zero everywhere.
        height: rows of the latents.
        width: columns of the latents.

    Returns:
        Weights; all 1 if the crop of the mask is black.
    """
    from PIL import Image, ImageOps

    averaged = np.array(ImageOps.fit(Image.fromarray(mask.astype(np.float32)), (width, height), Image.Resampling.BOX))
    mean = averaged.mean()
    return averaged / mean if mean > 0 else np.ones_like(averaged)


def loss_weights(pictures: Sequence[Picture], options: VariantOptions, latents: Sequence[int]) -> Tensor | None:
    """Return the weights of the loss for each example, float32 [n, h, w], or None if no picture has a mask.

    Args:
        pictures: the pictures, whose masks are read.
        options: determine the examples of each picture.
        latents: height and width of the latents.
    """
    import torch

    height, width = latents
    masks = [picture.mask() for picture in pictures]
    if all(mask is None for mask in masks):
        return None
    plain = np.ones((height, width), np.float32)
    weights = [plain if mask is None else latent_weights(mask, height, width) for mask in masks]
    sides = [(each, each[:, ::-1]) for each in weights]
    return torch.from_numpy(np.stack([sides[each.picture][each.flipped] for each in list_variants(pictures, options)]))
