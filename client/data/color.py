"""Convert a decoded picture to 8 bits and to sRGB, the color space that image models are trained in."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.errors import AntherError, shorten

if TYPE_CHECKING:
    from PIL.Image import Image

GRAY = ("1", "L", "LA", "La")
_SPACES = {"RGB": "RGB", "CMYK": "CMYK", "L": "GRAY"}  # color space of a profile that describes a mode
_NEARLY_EQUAL = 2  # of 255: a profile that changes no color by more is sRGB, up to its rounding


def to_8_bits(path: Path | str, image: Image, notes: list[str]) -> Image:
    """Convert 16-bit gray to 8 bits, rounded. Pillow itself reduces 16-bit color when it reads it.

    Args:
        path: the file's path, for error messages.
        image: the decoded picture.
        notes: a line is appended if the picture is converted.

    Raises:
        AntherError: the picture has 32 bits or floating-point numbers, for which no white is defined.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    if not (image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")):
        raise AntherError(f"{path}: has 32 bits a channel, without a defined white; save it as an 8-bit PNG or JPEG")
    from PIL import Image as Pillow

    notes.append("16 bits reduced to 8")
    levels = np.array(image).astype(np.uint16)
    transparent = image.info.get("transparency")
    gray = Pillow.fromarray(round_16_bits(levels))
    if isinstance(transparent, int):
        gray.putalpha(Pillow.fromarray(np.where(levels == transparent, 0, 255).astype(np.uint8)))
    gray.info |= {key: value for key, value in image.info.items() if key != "transparency"}
    return gray


def round_16_bits(levels: np.ndarray) -> np.ndarray:
    """Round 16-bit levels to the nearest of 8 bits, v / 257, without wider temporary numbers."""
    return (levels // 257 + (levels % 257 > 128)).astype(np.uint8)


def to_srgb(image: Image, notes: list[str]) -> Image:
    """Convert a picture to sRGB by its embedded color profile: relative colorimetric, with black point compensation.

    A picture without a profile is taken as sRGB, as in web browsers. So is one whose profile is damaged or describes
    another kind of picture.

    Args:
        image: the decoded picture, of any 8-bit mode.
        notes: a line is appended if colors are converted, or if the profile is ignored.
    """
    profile = image.info.get("icc_profile")
    if image.mode == "LAB":
        return _from_lab(image, notes)
    if not profile:
        if image.mode == "CMYK":
            notes.append("converted from CMYK, without a color profile")
        return image
    colors, alpha = _split_alpha(image)
    if colors.mode not in _SPACES:
        colors = colors.convert("RGB")
    from PIL import ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != _SPACES[colors.mode]:
            raise ValueError("a profile of another color space")
        transform = _transform(source, colors.mode)
        if colors.mode != "CMYK" and _changes_nothing(transform, colors.mode):
            return image
        converted = ImageCms.applyTransform(colors, transform)
    except Exception:  # the library raises many kinds
        notes.append("its color profile can't be used and is ignored")
        return image
    assert converted is not None
    notes.append(f"colors converted from {_description(source)} to sRGB")
    if colors.mode == "L":
        converted = converted.convert("L")
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def _split_alpha(image: Image) -> tuple[Image, Image | None]:
    """Return the colors as L, RGB or CMYK, and the alpha channel of a picture with transparency."""
    gray = image.mode in GRAY
    if image.has_transparency_data:
        full = image.convert("LA" if gray else "RGBA")
        return full.convert("L" if gray else "RGB"), full.getchannel("A")
    return (image.convert("L"), None) if gray else (image, None)


def _transform(source: Any, mode: str) -> Any:
    from PIL import ImageCms

    return ImageCms.buildTransform(
        source,
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )


def _changes_nothing(transform: Any, mode: str) -> bool:
    """Return whether a transform leaves a grid of all colors as it is, up to rounding."""
    from PIL import Image as Pillow
    from PIL import ImageCms

    levels = np.arange(0, 256, 15, dtype=np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3) if mode == "RGB" else levels[None]
    output = np.asarray(ImageCms.applyTransform(Pillow.fromarray(grid), transform)).astype(int)
    return bool(np.abs(output - (grid if mode == "RGB" else grid[..., None])).max() <= _NEARLY_EQUAL)


def _from_lab(image: Image, notes: list[str]) -> Image:
    from PIL import ImageCms

    notes.append("colors converted from Lab to sRGB")
    transform = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None
    return converted


def _description(profile: Any) -> str:
    return shorten((profile.profile.profile_description or "its color profile").strip(), 60)
