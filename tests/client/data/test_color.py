"""Bit depth and color profiles."""

from __future__ import annotations

import numpy as np
from PIL import Image

from client.data.color import round_16_bits, to_srgb
from tests.helpers import profiles


def test_each_16_bit_level_is_rounded() -> None:
    levels = np.arange(65536, dtype=np.uint16)
    assert np.array_equal(round_16_bits(levels), np.rint(levels / 257))


def test_srgb_by_another_name_changes_nothing() -> None:
    """Primaries of sRGB with another gamma are converted; the exact curve and primaries are recognized as sRGB."""
    from PIL import ImageCms

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8))
    image.info["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    notes: list[str] = []
    assert to_srgb(image, notes) is image
    image.info["icc_profile"] = profiles.rgb_profile(profiles.SRGB, "sRGB")  # misnamed: its gamma is 2.2
    assert to_srgb(image, notes) is not image
    assert notes == ["colors converted from sRGB to sRGB"]
