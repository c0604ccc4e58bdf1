"""ICC profiles built from the specification (ICC.1:2001-04), and the colors that they mean, without a color library."""

from __future__ import annotations

import struct

import numpy as np

GAMMA = 563 / 256  # the 2.2 of Adobe RGB (1998), as an unsigned 8.8 fixed-point number
ADOBE = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
DISPLAY_P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
"""Columns: XYZ of the primaries, adapted to D50."""
_D50 = (0.9642, 1.0, 0.8249)


def rgb_profile(primaries: np.ndarray, name: str) -> bytes:
    """Return a profile of three primaries and one gamma."""
    tags = {b"wtpt": _xyz(_D50), b"rTRC": _curve(), b"gTRC": _curve(), b"bTRC": _curve()}
    tags |= {tag: _xyz(primaries[:, index]) for index, tag in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    return _profile(b"RGB ", tags, name)


def gray_profile(name: str) -> bytes:
    """Return a profile of gray with the same gamma."""
    return _profile(b"GRAY", {b"wtpt": _xyz(_D50), b"kTRC": _curve()}, name)


def to_srgb(pixels: np.ndarray, primaries: np.ndarray) -> np.ndarray:
    """Convert uint8 [..., 3] of a profile to sRGB by its definition, as float64."""
    linear = (pixels / 255.0) ** GAMMA @ np.linalg.solve(SRGB, primaries).T
    return encode_srgb(linear)


def encode_srgb(linear: np.ndarray) -> np.ndarray:
    """Return the sRGB levels (IEC 61966-2-1) of linear light, as float64 in [0, 255]."""
    clipped = linear.clip(0, 1)
    return 255 * np.where(clipped <= 0.0031308, 12.92 * clipped, 1.055 * clipped ** (1 / 2.4) - 0.055)


def _profile(space: bytes, tags: dict[bytes, bytes], name: str) -> bytes:
    text = name.encode() + b"\0"
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">L", len(text)) + text + bytes(78),
        b"cprt": b"text" + bytes(4) + b"none\0",
        **tags,
    }
    start, table, body = 128 + 4 + 12 * len(tags), struct.pack(">L", len(tags)), b""
    for tag, data in tags.items():
        table += tag + struct.pack(">LL", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">L4sL4s4s4s", start + len(body), b"none", 0x02400000, b"mntr", space, b"XYZ ")
    head += struct.pack(">6H4s", 2026, 1, 1, 0, 0, 0, b"acsp")
    head = head.ljust(68, b"\0") + _numbers(_D50)
    return head.ljust(128, b"\0") + table + body


def _numbers(values: object) -> bytes:
    return b"".join(struct.pack(">l", round(value * 65536)) for value in values)  # type: ignore[attr-defined]


def _xyz(values: object) -> bytes:
    return b"XYZ " + bytes(4) + _numbers(values)


def _curve() -> bytes:
    return b"curv" + bytes(4) + struct.pack(">LH", 1, round(GAMMA * 256))
