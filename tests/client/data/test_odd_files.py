"""Odd picture files, each used, converted or refused in one line; pixels are checked against arrays and definitions."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from client.data.reading import decode, open_picture
from common.errors import AntherError
from tests.helpers import profiles

H, W = 12, 16
COLOR = np.random.default_rng(0).integers(0, 256, (H, W, 3), np.uint8)
GRAY = np.random.default_rng(1).integers(0, 256, (H, W), np.uint8)
ALPHA = np.random.default_rng(2).integers(0, 256, (H, W), np.uint8)
DEEP = np.random.default_rng(3).integers(0, 65536, (H, W), np.uint16)
SMOOTH = np.stack(np.broadcast_arrays(np.arange(W) * 15, np.arange(H)[:, None] * 20, 90), -1).astype(np.uint8)


def on_white(colors: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = (alpha / 255.0)[(..., *[None] * (colors.ndim - 2))]
    return colors * share + 255 * (1 - share)


def saved(pixels: np.ndarray | Image.Image, kind: str, **options: object) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_alpha(colors: np.ndarray, kind: str, **options: object) -> bytes:
    return saved(np.dstack([colors, ALPHA]), kind, **options)


def png(depth: int, color: int, pixels: np.ndarray, chunks: bytes = b"") -> bytes:
    """Return a PNG of big-endian samples, made without Pillow."""
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", W, H, depth, color, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunks + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def palette(kind: str, *, transparent: bool = False) -> bytes:
    image = Image.fromarray(GRAY % 8, "L").convert("P")
    image.putpalette([channel for index in range(256) for channel in (index * 30 % 256, index, 255 - index)])
    image.putdata((GRAY % 8).ravel().tolist())
    return saved(image, kind, **({"transparency": 3} if transparent else {}))


def from_palette(index: np.ndarray) -> np.ndarray:
    index = index.astype(int)
    return np.stack([index * 30 % 256, index, 255 - index], -1)


def animated(kind: str) -> bytes:
    further = [Image.new("RGB", (W, H), color) for color in ("red", "blue")]
    return saved(SMOOTH, kind, save_all=True, append_images=further, lossless=True)


def oriented(turn: int) -> bytes:
    exif = Image.Exif()
    exif[0x112] = turn
    return saved(COLOR, "PNG", exif=exif)


def ink(kind: str) -> tuple[bytes, np.ndarray]:
    """Return a CMYK file, and its color by the definition (1 − ink)(1 − black)."""
    levels = np.broadcast_to(np.array([200, 40, 90, 60], np.uint8), (H, W, 4))
    image = Image.frombytes("CMYK", (W, H), levels.tobytes())
    return saved(image, kind, **({"quality": 100, "subsampling": 0} if kind == "JPEG" else {})), (
        (255 - levels[..., :3].astype(float)) * (255 - levels[..., 3:].astype(float)) / 255
    )


def lab() -> bytes:
    """Return a TIFF of middle gray in CIE Lab: L* = 50, a* = b* = 0."""
    return saved(Image.frombytes("LAB", (W, H), bytes([128, 0, 0]) * (W * H)), "TIFF")


MATTE = [Image.new("L", (W, H), 200)]


@dataclass(frozen=True)
class OddFile:
    """A file, and its truth: pixels and the phrase of the conversion, or the refusal."""

    data: Callable[[], bytes]
    pixels: Callable[[], np.ndarray] | None = None
    note: str | None = None
    refused: str | None = None
    tolerance: float = 0.51  # rounding


READ = {
    "png color": OddFile(lambda: saved(COLOR, "PNG"), lambda: COLOR),
    "png gray": OddFile(lambda: saved(GRAY, "PNG"), lambda: GRAY),
    "png 1 bit": OddFile(lambda: saved(Image.fromarray(GRAY > 99), "PNG"), lambda: (GRAY > 99) * 255),
    "png alpha": OddFile(
        lambda: with_alpha(COLOR, "PNG"), lambda: on_white(COLOR, ALPHA), "transparent parts become white"
    ),
    "png opaque alpha": OddFile(
        lambda: saved(np.dstack([COLOR, np.full((H, W), 255, np.uint8)]), "PNG"), lambda: COLOR
    ),
    "png gray alpha": OddFile(
        lambda: saved(Image.fromarray(np.dstack([GRAY, ALPHA]), "LA"), "PNG"),
        lambda: on_white(GRAY, ALPHA),
        "transparent parts become white",
    ),
    "png palette": OddFile(lambda: palette("PNG"), lambda: from_palette(GRAY % 8)),
    "png transparent palette": OddFile(
        lambda: palette("PNG", transparent=True),
        lambda: np.where((GRAY % 8 == 3)[..., None], 255, from_palette(GRAY % 8)),
        "transparent parts become white",
    ),
    "png 16-bit gray": OddFile(lambda: png(16, 0, DEEP.astype(">u2")), lambda: DEEP / 257, "16 bits reduced to 8"),
    "png 16-bit transparent": OddFile(
        lambda: png(16, 0, DEEP.astype(">u2"), chunk(b"tRNS", struct.pack(">H", DEEP[0, 0]))),
        lambda: np.where(DEEP[0, 0] == DEEP, 255, DEEP / 257),
        "16 bits reduced to 8",
    ),
    "png 16-bit color": OddFile(
        lambda: png(16, 2, np.dstack([DEEP, DEEP[::-1], DEEP[:, ::-1]]).astype(">u2")),
        lambda: np.dstack([DEEP, DEEP[::-1], DEEP[:, ::-1]]) / 257,
        tolerance=1.0,  # Pillow keeps the upper byte
    ),
    "tiff 16-bit": OddFile(lambda: saved(Image.fromarray(DEEP), "TIFF"), lambda: DEEP / 257, "16 bits reduced to 8"),
    "tiff cmyk": OddFile(lambda: ink("TIFF")[0], lambda: ink("TIFF")[1], "CMYK", tolerance=1.01),
    "jpeg cmyk": OddFile(lambda: ink("JPEG")[0], lambda: ink("JPEG")[1], "CMYK", tolerance=3),
    "tiff lab": OddFile(lab, lambda: np.full((H, W, 3), 119), "from Lab", tolerance=1.01),
    "tiff lzw": OddFile(lambda: saved(COLOR, "TIFF", compression="tiff_lzw"), lambda: COLOR),
    "tiff pages": OddFile(
        lambda: saved(COLOR, "TIFF", save_all=True, append_images=MATTE), lambda: COLOR, "first of 2 frames"
    ),
    "bmp": OddFile(lambda: saved(COLOR, "BMP"), lambda: COLOR),
    "webp lossless": OddFile(lambda: saved(COLOR, "WEBP", lossless=True), lambda: COLOR),
    "webp animated": OddFile(lambda: animated("WEBP"), lambda: SMOOTH, "first of 3 frames"),
    "png animated": OddFile(lambda: animated("PNG"), lambda: SMOOTH, "first of 3 frames"),
    "gif animated": OddFile(
        lambda: saved(GRAY, "GIF", save_all=True, append_images=MATTE),
        lambda: np.dstack([GRAY] * 3),
        "first of 2 frames",
    ),
    "gif": OddFile(lambda: palette("GIF"), lambda: from_palette(GRAY % 8)),
    "jpeg gray": OddFile(lambda: saved(SMOOTH[..., 0], "JPEG", quality=100), lambda: SMOOTH[..., 0], tolerance=2),
    "jpeg progressive": OddFile(
        lambda: saved(SMOOTH, "JPEG", quality=100, subsampling=0, progressive=True), lambda: SMOOTH, tolerance=4
    ),
    "png upside down": OddFile(lambda: oriented(3), lambda: np.rot90(COLOR, 2), "turned upright"),
    "png on its side": OddFile(lambda: oriented(6), lambda: np.rot90(COLOR, -1), "turned upright"),
    "png mirrored": OddFile(lambda: oriented(2), lambda: COLOR[:, ::-1], "turned upright"),
    "png upright": OddFile(lambda: oriented(1), lambda: COLOR),
    "adobe rgb": OddFile(
        lambda: saved(SMOOTH, "PNG", icc_profile=profiles.rgb_profile(profiles.ADOBE, "Adobe RGB (1998)")),
        lambda: profiles.to_srgb(SMOOTH, profiles.ADOBE),
        "colors converted from Adobe RGB (1998) to sRGB",
        tolerance=1.01,
    ),
    "display p3 with alpha": OddFile(
        lambda: with_alpha(SMOOTH, "PNG", icc_profile=profiles.rgb_profile(profiles.DISPLAY_P3, "Display P3")),
        lambda: on_white(profiles.to_srgb(SMOOTH, profiles.DISPLAY_P3), ALPHA),
        "colors converted from Display P3 to sRGB",
        tolerance=1.6,
    ),
    "srgb profile": OddFile(lambda: saved(COLOR, "PNG", icc_profile=_srgb_profile()), lambda: COLOR),
    "gray profile": OddFile(
        lambda: saved(GRAY, "PNG", icc_profile=profiles.gray_profile("Gray 2.2")),
        lambda: profiles.encode_srgb((GRAY / 255) ** profiles.GAMMA),
        "Gray 2.2",
        tolerance=1.1,
    ),
    "damaged profile": OddFile(lambda: saved(COLOR, "PNG", icc_profile=b"x" * 200), lambda: COLOR, "is ignored"),
    "profile of another space": OddFile(
        lambda: saved(GRAY, "PNG", icc_profile=profiles.rgb_profile(profiles.ADOBE, "Adobe")),
        lambda: GRAY,
        "is ignored",
    ),
    "jpeg under another name": OddFile(
        lambda: saved(SMOOTH, "JPEG", quality=100, subsampling=0), lambda: SMOOTH, tolerance=4
    ),
}
REFUSED = {
    "empty": OddFile(lambda: b"", refused="is empty; copy it again"),
    "truncated png": OddFile(lambda: saved(COLOR, "PNG")[:-60], refused="it ends too early; copy it again"),
    "truncated jpeg": OddFile(lambda: saved(COLOR, "JPEG")[:-60], refused="it ends too early; copy it again"),
    "truncated webp": OddFile(lambda: saved(COLOR, "WEBP")[:-60], refused="save it again as PNG or JPEG"),
    "truncated gif": OddFile(lambda: saved(GRAY, "GIF")[:-60], refused="it ends too early; copy it again"),
    "tiff of floats": OddFile(lambda: saved(Image.new("F", (W, H)), "TIFF"), refused="has 32 bits a channel"),
    "text": OddFile(lambda: b"no picture", refused="save it again as PNG or JPEG"),
    "vector": OddFile(lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", refused="save it again"),
    "jpeg xl": OddFile(lambda: b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40), refused="save it again as PNG or JPEG"),
    "tiny": OddFile(lambda: saved(Image.new("L", (7, 90)), "PNG"), refused="7×90 pixels are too few"),
    "film": OddFile(lambda: b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(40), refused="save it again"),
}


def _srgb_profile() -> bytes:
    from PIL import ImageCms

    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def read(data: bytes, folder: Path, name: str = "odd file.png") -> tuple[np.ndarray, list[str]]:
    (folder / name).write_bytes(data)
    notes: list[str] = []
    with open_picture(folder / name) as file:
        return decode(folder / name, file, notes=notes), notes


@pytest.mark.parametrize("odd", READ.values(), ids=READ)
def test_odd_file_has_its_true_pixels(odd: OddFile, tmp_path: Path) -> None:
    assert odd.pixels is not None
    pixels, notes = read(odd.data(), tmp_path)
    expected = odd.pixels()
    assert pixels.dtype == np.uint8
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected.astype(float)).max() <= odd.tolerance
    assert bool(notes) == (odd.note is not None)
    assert (odd.note or "") in "; ".join(notes)


@pytest.mark.parametrize("odd", REFUSED.values(), ids=REFUSED)
def test_odd_file_is_refused_in_one_line(odd: OddFile, tmp_path: Path) -> None:
    with pytest.raises(AntherError) as raised:
        read(odd.data(), tmp_path, "new\nline.png")
    line = str(raised.value)
    assert "new line.png" in line
    assert odd.refused is not None
    assert odd.refused in line
    assert "\n" not in line


def test_matrix_is_large() -> None:
    assert len(READ) + len(REFUSED) >= 40


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_is_read(tmp_path: Path) -> None:
    pixels, _ = read(saved(SMOOTH, "AVIF", quality=100, subsampling="4:4:4"), tmp_path)
    assert np.abs(pixels - SMOOTH.astype(float)).max() <= 4


def test_avif_without_decoder_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "check", lambda _: False)
    with pytest.raises(AntherError, match=r"AVIF needs Pillow 11\.3 or later: pip install -U pillow"):
        read(b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(40), tmp_path)


@pytest.mark.parametrize("brands", [b"heic\0\0\0\0mif1heic", b"mif1\0\0\0\0mif1heic", b"heix\0\0\0\0mif1heix"])
def test_heic_without_library_names_the_extra(brands: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    with pytest.raises(AntherError, match=r"HEIC needs an optional library: pip install 'anther\[heic\]'"):
        read(b"\0\0\0\x18ftyp" + brands + bytes(40), tmp_path)


def test_heic_is_read_upright(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    exif = Image.Exif()
    exif[0x112] = 6
    pixels, _ = read(saved(SMOOTH, "HEIF", quality=100, exif=exif.tobytes(), chroma=444), tmp_path)
    expected = np.rot90(SMOOTH, -1)
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected.astype(float)).max() <= 6


@pytest.mark.parametrize("transparent", [False, True])
def test_reduced_copy_has_converted_colors(transparent: bool, tmp_path: Path) -> None:
    profile = profiles.rgb_profile(profiles.ADOBE, "Adobe RGB")
    channels = (60, 180, 90, *([255] * transparent))
    (tmp_path / "a.png").write_bytes(
        saved(np.broadcast_to(np.array(channels, np.uint8), (64, 64, len(channels))).copy(), "PNG", icc_profile=profile)
    )
    with open_picture(tmp_path / "a.png") as file:
        pixels = decode("a.png", file, side=8)
    assert pixels.shape == (16, 16, 3)
    truth = profiles.to_srgb(np.array([60, 180, 90]), profiles.ADOBE)
    assert np.abs(pixels - truth).max() <= 1.01


def test_huge_jpeg_is_read_at_a_fraction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.data.reading.MAX_PIXELS", 200 * 100)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)  # Pillow refuses twice as many
    levels = np.kron(np.array([[40, 200], [120, 80]], np.uint8), np.ones((160, 320), np.uint8))
    pixels, notes = read(saved(levels, "JPEG", quality=95), tmp_path)
    assert notes == ["640×320 pixels read at 1/4 of the size"]
    assert np.abs(pixels - levels[::4, ::4].astype(float)).mean() < 2
    with pytest.raises(AntherError, match="too many pixels, 640×320"):
        read(saved(levels, "JPEG", progressive=True), tmp_path)
    monkeypatch.setattr("client.data.reading.MAX_JPEG_PIXELS", 640 * 319)
    with pytest.raises(AntherError, match="too many pixels, 640×320"):
        read(saved(levels, "JPEG"), tmp_path)
    with pytest.raises(AntherError, match="too many pixels"):
        read(saved(levels, "PNG"), tmp_path)
