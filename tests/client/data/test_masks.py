"""Masks: the weights of latent positions, flipped and cropped with their picture, and one line for each mistake."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from client.data import StoredPicture, load_folder
from client.data.masks import latent_weights, loss_weights
from common.errors import AntherError
from training.jobs import Picture
from training.variants import PLAIN, VariantOptions


def album(folder: Path, mask: np.ndarray | None, size: tuple[int, int] = (16, 16)) -> Path:
    """Write two pictures, the first with a mask."""
    (folder / "train").mkdir()
    for name in "ab":
        Image.new("RGB", size).save(folder / f"train/{name}.jpg")
        (folder / f"train/{name}.txt").write_text("a cat")
    if mask is not None:
        Image.fromarray(mask).save(folder / "train/a.mask.png")
    return folder


def test_weights_are_block_averages() -> None:
    mask = np.random.default_rng(0).integers(0, 256, (24, 24)).astype(np.float32)
    blocks = mask.reshape(4, 6, 4, 6).mean((1, 3))
    assert np.allclose(latent_weights(mask, 4, 4), blocks / blocks.mean(), atol=1e-5)
    wide = np.pad(mask, ((0, 0), (6, 6)), constant_values=255)  # the centered square is unchanged
    assert np.allclose(latent_weights(wide, 4, 4), blocks / blocks.mean(), atol=1e-5)


def test_black_crop_weights_all_alike() -> None:
    mask = np.zeros((8, 24), np.float32)
    mask[:, :4] = 1
    assert np.array_equal(latent_weights(mask, 4, 4), np.ones((4, 4)))


def test_mask_belongs_to_its_picture(tmp_path: Path) -> None:
    mask = np.zeros((16, 16), np.uint8)
    mask[:, :4] = 255
    pictures = load_folder(album(tmp_path, mask)).train
    assert [picture.mask() is not None for picture in pictures] == [True, False]
    options = VariantOptions(captions=True, flip=True)
    weights = loss_weights(pictures, options, (4, 4))
    assert weights is not None
    first = np.zeros((4, 4))
    first[:, 0] = 4
    assert np.array_equal(weights.numpy(), np.stack([first, first[:, ::-1], np.ones((4, 4)), np.ones((4, 4))]))


def test_without_masks_there_are_no_weights(tmp_path: Path) -> None:
    pictures = load_folder(album(tmp_path, None)).train
    assert loss_weights(pictures, PLAIN, (4, 4)) is None
    assert loss_weights([Picture(np.zeros((8, 8), np.uint8), "a")], PLAIN, (4, 4)) is None


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((16, 16), np.uint8), r"a\.mask\.png: is black everywhere"),
        (np.full((16, 20), 255, np.uint8), r"a\.mask\.png: has another shape than its picture"),
    ],
)
def test_unusable_mask_is_one_line(mask: np.ndarray, message: str, tmp_path: Path) -> None:
    with pytest.raises(AntherError, match=message):
        load_folder(album(tmp_path, mask))


def test_damaged_mask_is_named(tmp_path: Path) -> None:
    album(tmp_path, np.ones((16, 16), np.uint8))
    (tmp_path / "train/a.mask.png").write_bytes(b"no picture")
    with pytest.raises(AntherError, match=r"a\.mask\.png: can't be read as a picture"):
        load_folder(tmp_path)


def test_mask_follows_the_orientation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    for name in ("a.png", "a.mask.png"):
        Image.new("L", (24, 16), 255).save(tmp_path / name, exif=exif)
    mask = StoredPicture(tmp_path / "a.png", "a", mask=tmp_path / "a.mask.png").mask()
    assert mask is not None
    assert mask.shape == (24, 16)
